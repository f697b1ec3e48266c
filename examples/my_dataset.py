import numpy as np
import torch
from my_env import Corridor

from clbench import OfflineDataset


def corridor_walks(*, cells: int = 10, episodes: int = 100, seed: int = 0) -> OfflineDataset:
    """Walks of an expert to the mark, in the corridor of ``my_env.py``."""
    env = Corridor(cells)
    observations, actions, lengths, final = [], [], [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        over = False
        while not over:
            observations.append(obs)
            actions.append(int(obs[1] > obs[0]))
            obs, _, terminated, truncated, _ = env.step(actions[-1])
            over = terminated or truncated
        lengths.append(len(actions) - sum(lengths))
        final.append(obs)  # what the episode's last action led to
    return OfflineDataset(
        torch.from_numpy(np.stack(observations)),
        torch.tensor(actions),
        torch.tensor(lengths),
        torch.from_numpy(np.stack(final)),
    )
