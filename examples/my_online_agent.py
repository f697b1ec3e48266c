import copy
from dataclasses import dataclass

import torch
from torch import nn

from clbench import Agent


class ActorCritic(Agent):
    """One-step actor-critic for discrete actions: one update per step of all parallel environments."""

    requires = frozenset({"env", "discrete", "state"})

    @dataclass
    class Config:
        hidden: int = 64
        lr: float = 1e-3
        discount: float = 0.95

    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        inputs, actions = spaces.observation.shape[0], int(spaces.action.n)
        layers = nn.Linear(inputs, config.hidden), nn.Tanh(), nn.Linear(config.hidden, actions + 1)
        self.net = nn.Sequential(*layers).to(device)  # logits of the actions, and the value
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr)

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        logits = self.net(obs)[:, :-1]
        return self.draw(logits, rng) if explore else logits.argmax(1), memory

    def draw(self, logits, rng):
        return torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]

    def learn(self, experience, budget, *, rng):
        env = experience.env
        nothing = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
        obs, _ = env.reset(options={"reset_mask": nothing})  # resets no row: where the environment stands now
        for step in range(env.num_envs, budget + 1, env.num_envs):
            output = self.net(obs)
            logits, value = output[:, :-1], output[:, -1]
            actions = self.draw(logits, rng)
            obs, reward, terminated, truncated, info = env.step(actions)
            with torch.no_grad():  # the end of an episode is in final_obs; obs already begins the next one
                following = torch.where((terminated | truncated)[:, None], info["final_obs"], obs)
                target = reward + self.config.discount * ~terminated * self.net(following)[:, -1]
            advantage = target - value
            chosen = logits.log_softmax(1).gather(1, actions[:, None])[:, 0]
            loss = (advantage.square() - advantage.detach() * chosen).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield {"step": step, "loss": loss.item(), "reward": reward.mean().item()}

    def state_dict(self):
        return copy.deepcopy({"net": dict(self.net.state_dict()), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
