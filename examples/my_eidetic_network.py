"""A network of eidetic layers that learns two toy tasks, one after the other, and the evidence that it keeps the first."""

import torch
from torch import nn

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.pruning import Pruner, Pruning

TASKS = (
    lambda x: x.square().sum(1) > 3.4,  # outside of a ball
    lambda x: x[:, 0] * x[:, 1] > 0,  # two coordinates of equal sign
)
UPDATES = 300


class MyNetwork(eidetic.EideticNetwork):
    """(B, inputs) -> (B, classes): two hidden layers, one with BatchNorm and one with PrefixNorm."""

    def __init__(self, inputs=4, width=48, classes=2):
        super().__init__()
        x = self.inputs("x", inputs)
        first, second = self.space("first", width), self.space("second", width)
        self.body = nn.Sequential(
            eidetic.Linear(x, first), eidetic.BatchNorm(first), eidetic.Activation("relu"),
            eidetic.Linear(first, second), eidetic.PrefixNorm(second), eidetic.Activation("silu"),
        )  # fmt: skip
        self.head = self.heads(second, classes)

    def forward(self, x, task):
        return self.head(self.body(x), task)


def accuracy(network, task, x):
    """In eval mode, as a number in [0, 1]."""
    network.eval()
    with torch.no_grad():
        correct = network(x, task=task).argmax(1) == TASKS[task](x)
    network.train()
    return float(correct.float().mean())


def learn():
    """The trained network, with both tasks committed."""
    rng = torch.Generator().manual_seed(0)
    network = MyNetwork()
    pruner = Pruner(network, Pruning(tasks=len(TASKS)))
    optimizer = None
    for label in TASKS:
        task = network.begin_task(rng)  # fresh free units, and a head
        if optimizer is None:
            optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.1)
        else:  # the same object goes on; it does not know the new head yet
            optimizer.add_param_group({"params": network.head.layers[task].parameters()})
        held_out = torch.randn(1000, 4, generator=rng)
        pruner.begin(UPDATES)
        for _ in range(UPDATES):
            x = torch.randn(64, 4, generator=rng)
            loss = nn.functional.cross_entropy(network(x, task=task), label(x).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pruner.advance(  # kills, waits, judges, and goes back where too much was lost
                quality=lambda task=task, x=held_out: 2 * accuracy(network, task, x) - 1,
                losses=lambda: (), optimizer=optimizer, rng=rng,
            )  # fmt: skip
        network.commit(probes=[held_out[:32]])
    return network
