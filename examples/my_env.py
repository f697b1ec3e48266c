import gymnasium
import numpy as np


class Corridor(gymnasium.Env):
    """Walk along a corridor to a mark; the agent sees where it is and where the mark is, both in [0, 1]."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)  # back, forth
    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, cells: int = 10):
        self.cells = cells

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # makes self.np_random from the seed
        self.place, self.mark = self.np_random.integers(self.cells, size=2).tolist()
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.place = int(np.clip(self.place + (1 if action == 1 else -1), 0, self.cells - 1))
        self.steps += 1
        success = self.place == self.mark
        truncated = self.steps >= 2 * self.cells and not success
        return self._observe(), float(success), success, truncated, {"is_success": success}

    def render(self):
        picture = np.full((8, 8 * self.cells, 3), 255, np.uint8)
        for cell, colour in ((self.mark, (0, 140, 0)), (self.place, (200, 0, 0))):
            picture[:, 8 * cell : 8 * cell + 8] = colour
        return picture

    def _observe(self):
        return np.array([self.place, self.mark], np.float32) / (self.cells - 1)
