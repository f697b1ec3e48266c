"""Small networks of every kind of layer, the life of tasks on them, and what finished tasks are compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.verify import activations, evaluating, outputs, same

CLASSES = 3
# passes of pruning per task, each of which kills half of what is left: later tasks prune more than earlier ones
PASSES = (1, 2, 2, 3, 4)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Zoo(eidetic.EideticNetwork):
    """At least three hidden layers of one kind, with one kind of norm: "none", "batch" or "prefix"."""

    def __init__(self, kind: str = "mlp", norm: str = "none", **options: Any):
        super().__init__(**options)
        self.kind, self.norm_kind = kind, norm
        self.act = eidetic.Activation("silu")
        getattr(self, f"make_{kind.removesuffix('_last')}")()

    def norm(self, space: eidetic.Space) -> nn.Module:
        return {"none": nn.Identity, "batch": eidetic.BatchNorm, "prefix": eidetic.PrefixNorm}[self.norm_kind](
            *([] if self.norm_kind == "none" else [space])
        )

    def on_last(self, norm: nn.Module, x: Tensor) -> Tensor:
        """A norm on the last axis, whatever the others are."""
        return norm(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if isinstance(norm, eidetic.BatchNorm) else norm(x)

    def make_mlp(self) -> None:
        x, a, b, c = self.inputs("x", 6), self.space("a", 16), self.space("b", 20), self.space("c", 16)
        self.l1, self.l2, self.l3 = eidetic.Linear(x, a), eidetic.Linear(a, b), eidetic.Linear(b, c)
        self.n1, self.n2, self.n3 = self.norm(a), self.norm(b), self.norm(c)
        self.out = self.heads(c, CLASSES)

    def run_mlp(self, x: Tensor) -> Tensor:
        x = self.act(self.n1(self.l1(x)))
        x = self.act(self.n2(self.l2(x)))
        return self.act(self.n3(self.l3(x)))

    def make_conv(self) -> None:
        x, a, b, c = self.inputs("x", 2), self.space("a", 10), self.space("b", 12), self.space("c", 16)
        last = self.kind.endswith("_last")
        self.l1, self.l2 = eidetic.Conv2d(x, a, 3, padding=1), eidetic.Conv2d(a, b, 3, stride=2, padding=1)
        self.l3 = eidetic.Linear(b, c, repeat=9, channels_last=last)
        self.n1, self.n2, self.n3 = self.norm(a), self.norm(b), self.norm(c)
        self.out = self.heads(c, CLASSES)

    def run_conv(self, x: Tensor) -> Tensor:
        for layer, norm in ((self.l1, self.n1), (self.l2, self.n2)):
            x = layer(x)
            if self.norm_kind == "prefix":
                x = norm(x.movedim(1, -1)).movedim(-1, 1)
            else:
                x = norm(x)
            x = self.act(x)
        x = x.permute(0, 2, 3, 1).flatten(1) if self.kind.endswith("_last") else x.flatten(1)
        return self.act(self.n3(self.l3(x)))

    def make_residual(self) -> None:
        x, r, a, b = self.inputs("x", 6), self.space("r", 16), self.space("a", 16), self.space("b", 16)
        self.l1 = eidetic.Linear(x, r)
        self.up = nn.ModuleList([eidetic.Linear(r, a), eidetic.Linear([r, x], b)])
        self.down = nn.ModuleList([eidetic.Linear(a, r), eidetic.Linear(b, r)])
        self.norms = nn.ModuleList([self.norm(r), self.norm(r)])
        self.out = self.heads([r, b], CLASSES)

    def run_residual(self, x: Tensor) -> Tensor:
        r = self.l1(x)
        hidden = x
        for i in range(2):
            h = self.norms[i](r)
            hidden = self.act(self.up[i](h if i == 0 else torch.cat([h, x], -1)))
            r = r + self.down[i](hidden)
        return torch.cat([r, hidden], -1)

    def make_gru(self) -> None:
        x, a, g, c = self.inputs("x", 5), self.space("a", 16), self.space("g", 12), self.space("c", 16)
        self.l1, self.gru, self.l2 = eidetic.Linear(x, a), eidetic.GRUCell(a, g), eidetic.Linear(g, c)
        self.n1, self.n2 = self.norm(a), self.norm(g)
        self.out = self.heads(c, CLASSES)

    def run_gru(self, x: Tensor) -> Tensor:
        x = self.act(self.on_last(self.n1, self.l1(x)))
        h = x.new_zeros(len(x), self.spaces["g"].width)
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], h)
        return self.act(self.l2(self.n2(h)))

    def make_attention(self) -> None:
        x, r, c = self.inputs("x", 5), self.space("r", 16), self.space("c", 16)
        self.l1 = eidetic.Linear(x, r)
        self.att = eidetic.MultiheadAttention(r, self.space("hd", 8, group=3), r, causal=True)
        self.n1, self.n2, self.l2 = self.norm(r), self.norm(r), eidetic.Linear(r, c)
        self.out = self.heads(c, CLASSES)

    def run_attention(self, x: Tensor) -> Tensor:
        r = self.l1(x)
        r = r + self.att(self.on_last(self.n1, r))
        return self.act(self.l2(self.on_last(self.n2, r))).mean(1)

    def make_embedding(self) -> None:
        a, b, c = self.space("a", 16), self.space("b", 16), self.space("c", 16)
        self.l1, self.l2, self.l3 = eidetic.Embedding(9, a), eidetic.Linear(a, b), eidetic.Linear(b, c)
        self.n1, self.n2, self.n3 = self.norm(a), self.norm(b), self.norm(c)
        self.out = self.heads(c, CLASSES)

    run_embedding = run_mlp

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.out(getattr(self, f"run_{self.kind.removesuffix('_last')}")(x), task)


SHAPES = {"conv": (2, 6, 6), "conv_last": (2, 6, 6), "gru": (3, 5), "attention": (4, 5), "embedding": ()}


def draw(net: eidetic.EideticNetwork, rows: int, seed: int) -> Tensor:
    """Inputs that the network can take."""
    kind = getattr(net, "kind", "mlp")
    if kind == "embedding":
        return torch.randint(9, (rows,), generator=generator(seed))
    x = torch.randn(rows, *SHAPES.get(kind, (6,)), generator=generator(seed))
    return x.to(next(net.parameters()).dtype)


def loss_of(net: eidetic.EideticNetwork, task: int, seed: int, rows: int = 32) -> Tensor:
    target = torch.randint(CLASSES, (rows,), generator=generator(1000 + task))
    return nn.functional.cross_entropy(net(draw(net, rows, seed), task=task).float(), target)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def step(net: eidetic.EideticNetwork, optimizer: torch.optim.Optimizer, task: int, seed: int) -> None:
    net.train()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, task, seed)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        optimizer.step()


def prune(net: eidetic.EideticNetwork, rng: torch.Generator, how: str = "random", keep: float = 0.5) -> None:
    """Kill free units of each space, at random or by the norms of their rows, and leave at least one."""
    for space in net.prunable().values():
        found = space.candidates.nonzero()[:, 0]
        if how == "random":
            order = torch.randperm(len(found), generator=rng)
        else:
            score = torch.zeros(space.size)
            for _, parameter in net.writers(space):
                rows = parameter().detach().float().movedim(parameter.out[0], 0).flatten(1).abs()
                # gates and the numbers of a head side by side: summed per unit
                per_row = rows.sum(1) if how == "l1" else rows.square().sum(1)
                score += per_row.reshape(-1, space.size, space.group).sum((0, 2))
            order = score[found].argsort()
        mask = torch.zeros(space.size, dtype=torch.bool)
        mask[found[order[: len(found) - max(1, round(keep * len(found)))]]] = True
        space.kill(mask)


def look(net: eidetic.EideticNetwork, probes: Sequence[Tensor], task: int) -> Any:
    """What a finished task gives for each probe, and the activations of everything it may read."""
    acts = {k: v for k, v in activations(net, [probes[-1]], task).items() if any(x.numel() for x in v)}
    return [outputs(net, [p], task) for p in probes], acts


class Watch:
    """Remembers what finished tasks give, and says which ones give something else."""

    def __init__(self, batches: Sequence[int] = (1, 7)):
        self.batches, self.before = batches, {}  # type: ignore[var-annotated]

    def add(self, net: eidetic.EideticNetwork, task: int) -> None:
        probes = [draw(net, n, 500 + n) for n in self.batches]
        self.before[task] = probes, look(net, probes, task)

    def changed(self, net: eidetic.EideticNetwork) -> list[int]:
        return [k for k, (probes, old) in self.before.items() if not same(old, look(net, probes, k))]


def live(
    net: eidetic.EideticNetwork, tasks: int = 3, *, optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    steps: int = 2, how: str = "random", watch: Watch | None = None, after: Callable[[str, int], None] | None = None,
    passes: Sequence[int] = PASSES, remember: bool = False, renew: bool = False,
) -> Watch:  # fmt: skip
    """Tasks one after the other with one optimizer for all of them (or, with ``renew``, one per task).

    Args:
        after: called with the name of each step and the task, once the step is done.
        remember: commit with probes.
    """
    watch = watch or Watch()
    rng, opt = generator(1), None

    def done(what: str, task: int) -> None:
        if after is not None:
            after(what, task)

    for _ in range(tasks):
        t = net.begin_task(rng)
        done("begin", t)
        if opt is None or renew:
            opt = optimizer(net.parameters())
        elif not isinstance(opt, torch.optim.LBFGS):
            known = {id(p) for g in opt.param_groups for p in g["params"]}
            opt.add_param_group({"params": [p for p in net.parameters() if id(p) not in known]})
        for i in range(passes[t % len(passes)] + 1):
            for j in range(steps):
                step(net, opt, t, 100 * t + 10 * i + j)
            done("train", t)
            if i < passes[t % len(passes)]:
                prune(net, rng, how)
                done("prune", t)
        net.commit([draw(net, 5, 77)] if remember else None)
        done("commit", t)
        watch.add(net, t)
    return watch


def unchecked(kind: type[eidetic.EideticNetwork]) -> type[eidetic.EideticNetwork]:
    """A broken network that is not refused at once, so that the evidence has to find it."""
    return type(f"Unchecked{kind.__name__}", (kind,), {"check": lambda self: None})


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """What the tests of this folder share."""
    return SimpleNamespace(
        Zoo=Zoo, Watch=Watch, live=live, step=step, prune=prune, look=look, draw=draw, loss_of=loss_of, adamw=adamw,
        generator=generator, unchecked=unchecked, evaluating=evaluating, outputs=outputs, same=same,
    )  # fmt: skip
