import gymnasium
import numpy as np
import torch

from clbench.envs.seeding import EpisodeSeeds, check_batch, split_options
from clbench.rng import hash_uniform


class Corridors:
    """The corridor of ``my_env.py``, all rows at once, on any device."""

    def __init__(self, num_envs: int = 1, device: str = "cpu", autoreset: str = "same_step", cells: int = 10):
        self.device = check_batch(num_envs, device, autoreset)
        self.num_envs, self.autoreset, self.cells = num_envs, autoreset, cells
        self.max_episode_steps = 2 * cells
        self.single_observation_space = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)
        self.single_action_space = gymnasium.spaces.Discrete(2)
        self.seeds = EpisodeSeeds(num_envs, self.device)
        self.cell = torch.zeros(num_envs, 2, dtype=torch.int64, device=self.device)  # columns: agent, mark
        self.steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def reset(self, *, seed=None, options=None):
        mask, _ = split_options(options, self.num_envs, self.device)
        self._begin(seed, mask)
        return self._observe(), {"is_success": torch.zeros_like(mask)}

    def _begin(self, seed, mask):
        self.seeds.start(seed, mask)
        start = (hash_uniform(self.seeds.current(), 0, 2) * self.cells).to(torch.int64)
        self.cell = torch.where(mask[:, None], start, self.cell)
        self.steps = torch.where(mask, 0, self.steps)

    def step(self, actions):
        place = (self.cell[:, 0] + 2 * actions - 1).clamp(0, self.cells - 1)
        self.cell = torch.stack([place, self.cell[:, 1]], 1)
        self.steps = self.steps + 1
        success = self.cell[:, 0] == self.cell[:, 1]
        truncated = (self.steps >= self.max_episode_steps) & ~success
        info = {"is_success": success}
        if self.autoreset == "same_step":
            done = success | truncated
            info |= {"final_obs": self._observe(), "_final_obs": done}
            self._begin(None, done)
        return self._observe(), success.to(torch.float32), success, truncated, info

    def _observe(self):
        return self.cell.to(torch.float32) / (self.cells - 1)

    def render(self):
        pictures = np.full((self.num_envs, 8, 8 * self.cells, 3), 255, np.uint8)
        for row, (place, mark) in enumerate(self.cell.tolist()):
            for cell, colour in ((mark, (0, 140, 0)), (place, (200, 0, 0))):
                pictures[row, :, 8 * cell : 8 * cell + 8] = colour
        return pictures

    def state_dict(self):
        return {"seeds": self.seeds.state_dict(), "cell": self.cell.clone(), "steps": self.steps.clone()}

    def load_state_dict(self, state):
        self.seeds.load_state_dict(state["seeds"])
        self.cell, self.steps = (state[k].to(self.device, copy=True) for k in ("cell", "steps"))

    def close(self):
        pass
