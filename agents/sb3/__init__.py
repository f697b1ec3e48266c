"""Stable-Baselines3's online algorithms as agents. SB3 drives the environment in ``learn``; nothing of it is patched."""

from clbench.agents.sb3.algorithms import SB3DQN, SB3PPO, SB3SAC, SB3TD3

__all__ = ["SB3DQN", "SB3PPO", "SB3SAC", "SB3TD3"]
