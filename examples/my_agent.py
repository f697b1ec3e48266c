import copy
from dataclasses import dataclass

import torch
from torch import nn

from clbench import Agent


class MyAgent(Agent):
    """A classifier that is trained by gradient descent, one task after the other."""

    requires = frozenset({"dataset", "discrete", "state"})

    @dataclass
    class Config:
        hidden: int = 128
        lr: float = 1e-3
        batch_size: int = 64

    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        inputs, classes = spaces.observation.shape[0], int(spaces.action.n)
        layers = nn.Linear(inputs, config.hidden), nn.ReLU(), nn.Linear(config.hidden, classes)
        self.net = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr)

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return self.net(obs).argmax(1), memory

    def learn(self, experience, budget, *, rng):
        for _ in range(budget):
            batch = experience.dataset.sample(self.config.batch_size, rng)
            loss = nn.functional.cross_entropy(self.net(batch.observations), batch.actions)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield {"loss": loss.item()}

    def state_dict(self):
        return copy.deepcopy({"net": dict(self.net.state_dict()), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
