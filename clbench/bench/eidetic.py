"""What ownership costs: a training step of an eidetic network beside the plain one of the same shape.

The eidetic network has three finished tasks, which own half of its hidden units, and trains the fourth; the plain one has
torch's own layers and one head. Both take the same batch, cross-entropy and fused Adam. Memory counts the bytes that are
alive at the end of the forward pass and during the step: parameters, gradients, moments, buffers, and all tensors that
backward needs, each storage once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from clbench.agents.networks.eidetic.policy import CHANNELS, EideticPolicy, prepare
from clbench.agents.networks.encoders import Parts
from clbench.rng import torch_generator

# observation shape, hidden sizes, batch: the default agent on digits; the network of arXiv 2502.09500 for permuted MNIST;
# small images
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "eidetic:mlp": ((64,), (512, 512), 64),
    "eidetic:mlp-paper": ((784,), (2000, 2000), 256),
    "eidetic:cnn": ((3, 32, 32), (256, 256), 64),
}
CLASSES = 10
FINISHED = 3  # tasks, which own half of the units


def implementations(method: str, device: str, quick: bool) -> tuple[dict[str, Callable[[], Any]], Any, float]:
    """One update of (ours, plain), the options, and the memory of ours divided by that of the plain network."""
    shape, hidden, size = SHAPES[method]
    hidden, size = ((16, 16), 8) if quick else (hidden, size)
    image = len(shape) == 3
    space = Box(0, 255, shape, np.uint8) if image else Box(-1, 1, shape, np.float32)
    rng = torch_generator(0, "bench", "updates", "eidetic", device=device)
    batch = torch.rand(size, *shape, generator=rng, device=rng.device)
    x = (batch * 255).to(torch.uint8) if image else batch
    y = torch.randint(CLASSES, (size,), generator=rng, device=rng.device)
    parts = Parts(space).to(device)
    ours = half_owned(EideticPolicy(parts, CLASSES, hidden).to(device), rng)
    other = plain(parts, hidden).to(device)
    (inputs,) = prepare(parts, x)
    learners = {
        "ours": Learner(list(ours.parameters()), lambda: ours(inputs, task=FINISHED), y, ours),
        "plain": Learner(list(other.parameters()), lambda: other(inputs), y, other),
    }
    memory = {name: learner.memory() for name, learner in learners.items()}
    config = SimpleNamespace(batch_size=size, hidden=hidden)
    return {k: v.update for k, v in learners.items()}, config, memory["ours"] / memory["plain"]


def half_owned(network: EideticPolicy, rng: torch.Generator) -> EideticPolicy:
    """Three committed tasks with a sixth of the units each; the fourth begun."""
    for task in range(FINISHED):
        network.begin_task(rng)
        for space in network.prunable().values():
            free = space.candidates.nonzero()[:, 0]
            order = free[torch.randperm(len(free), generator=rng, device=rng.device)]
            kill = torch.zeros_like(space.alive)
            kill[order[max(1, space.size * (task + 1) // 6 - space.size * task // 6) :]] = True
            space.kill(kill)
        network.commit()
    network.begin_task(rng)
    return network.train()


def plain(parts: Parts, hidden: tuple[int, ...]) -> nn.Sequential:
    """Torch's layers in the shape of :class:`EideticPolicy`."""
    layers: list[nn.Module] = []
    size = parts.flat_size
    for planes, height, width in parts.image_shapes:
        for channels in CHANNELS:
            layers += [nn.Conv2d(planes, channels, 3, stride=2, padding=1), nn.ReLU()]
            planes, height, width = channels, (height + 1) // 2, (width + 1) // 2
        layers += [nn.Flatten(), nn.Linear(planes * height * width, 256), nn.ReLU()]
        size = 256
    for width in hidden:
        layers += [nn.Linear(size, width), nn.ReLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, CLASSES))


class Learner:
    """Cross-entropy on one batch and fused Adam."""

    def __init__(self, parameters: list[nn.Parameter], forward: Callable[[], Tensor], y: Tensor, module: nn.Module):
        self.forward, self.y, self.module = forward, y, module
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def update(self) -> None:
        loss = nn.functional.cross_entropy(self.forward(), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def memory(self) -> int:
        """Bytes; see the module."""
        self.update()
        alive: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            alive[storage.data_ptr()] = storage.nbytes()
            return tensor

        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            count(tensor)
            if tensor.grad is not None:
                count(tensor.grad)
        for state in self.optimizer.state.values():
            for value in state.values():
                count(value)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            self.forward().sum()
        return sum(alive.values())
