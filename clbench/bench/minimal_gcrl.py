"""Training loops of offline goal-conditioned RL as one writes them by hand for one method: the limit of ``bench updates``.

One function per loss, plain ``nn.Sequential``, a Python loop over the members of an ensemble, data that are normalised
beforehand (with all features), indices drawn on tensors, one backward pass, fused Adam. The maths is that of the agents of
the same name, see there; a test compares losses and gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Nets = Any  # nn.ModuleDict: the members of each network in a ModuleList, single parameters in a ParameterList


@dataclass
class Rows:
    """``B`` rows: states, next states, goals of value and actor, actions, 1 where the value's goal is the state itself.

    ``w`` and ``target`` are HIQL's subgoals for the low and the high policy, ``z`` HILP's skills.
    """

    s: Tensor
    s_next: Tensor
    g_v: Tensor
    g_a: Tensor
    a: Tensor
    hit: Tensor
    w: Any = None
    target: Any = None
    z: Any = None


# -- networks ------------------------------------------------------------------------------------------------------------


def mlp(n_in: int, hidden: tuple[int, ...], n_out: int, norm: bool = True, relu: bool = False) -> nn.Sequential:
    """Dense, activation, LayerNorm for each hidden layer, then Dense."""
    layers: list[nn.Module] = []
    for n in hidden:
        layers += [nn.Linear(n_in, n), nn.ReLU() if relu else nn.GELU(approximate="tanh")]
        layers += [nn.LayerNorm(n, eps=1e-6)] if norm else []
        n_in = n
    return nn.Sequential(*layers, nn.Linear(n_in, n_out))


def networks(method: str, obs: int, act: int, c: Any) -> tuple[Nets, dict[str, str]]:
    """The networks of a method for states and goals of ``obs`` numbers, and target network -> network."""
    h, sg = c.hidden, 2 * obs

    def some(members: int, *sizes: int, **options: bool) -> nn.ModuleList:
        return nn.ModuleList(mlp(sizes[0], h, sizes[1], **options) for _ in range(members))

    actor = {} if method in ("hiql", "hilp") else {"actor": some(1, sg, act, norm=False)}
    nets: dict[str, nn.Module] = {}
    targets: dict[str, str] = {}
    if method == "gcivl":
        nets = {"value": some(2, sg, 1), "target_value": some(2, sg, 1)}
    elif method == "gciql":
        nets = {"value": some(1, sg, 1), "critic": some(2, sg + act, 1), "target_critic": some(2, sg + act, 1)}
    elif method == "qrl":
        nets = {"phi": some(1, obs, c.latent_dim), "scalars": nn.ParameterList([torch.zeros(()), torch.zeros(())])}
        if c.actor_loss == "ddpg-bc":
            nets["dynamics"] = some(1, c.latent_dim + act, c.latent_dim)
    elif method == "crl":
        nets = {"critic_phi": some(2, obs + act, c.latent_dim), "critic_psi": some(2, obs, c.latent_dim)}
        if c.actor_loss == "awr":
            nets |= {"value_phi": some(1, obs, c.latent_dim), "value_psi": some(1, obs, c.latent_dim)}
    elif method == "hiql":
        nets = {"goal_rep": some(1, sg, c.rep_dim), "value": some(2, obs + c.rep_dim, 1)}
        nets |= {"target_value": some(2, obs + c.rep_dim, 1), "high_actor": some(1, sg, c.rep_dim, norm=False)}
        nets |= {"low_actor": some(1, obs + c.rep_dim, act, norm=False)}
    elif method == "hilp":
        z = c.skill_dim
        nets = {"phi": some(2, obs, z), "target_phi": some(2, obs, z), "skill_value": some(1, obs + z, 1)}
        nets |= {"skill_critic": some(2, obs + z + act, 1), "target_skill_critic": some(2, obs + z + act, 1)}
        nets |= {"skill_actor": some(1, obs + z, act, norm=False, relu=True)}
        nets["log_std"] = nn.ParameterList([torch.zeros(act)])
    targets = {name: name.removeprefix("target_") for name in nets if name.startswith("target_")}
    return nn.ModuleDict({**nets, **actor}), targets


def frozen(net: nn.Module, evaluate: Callable[[], Tensor]) -> Tensor:
    """A result through which no gradient reaches the parameters of ``net``."""
    net.requires_grad_(False)
    result = evaluate()
    net.requires_grad_(True)
    return result


# -- losses --------------------------------------------------------------------------------------------------------------

LOG_2PI = math.log(2 * math.pi)


def log_prob(mean: Tensor, a: Tensor, log_std: Tensor | None = None) -> Tensor:
    if log_std is None:
        return -0.5 * (a - mean).square().sum(1) - 0.5 * LOG_2PI * a.shape[1]
    return (-0.5 * ((a - mean) * torch.exp(-log_std)).square() - log_std).sum(1) - 0.5 * LOG_2PI * a.shape[1]


def awr(mean: Tensor, a: Tensor, advantage: Tensor, alpha: float, log_std: Tensor | None = None) -> Tensor:
    return -(torch.exp(alpha * advantage).clamp(max=100) * log_prob(mean, a, log_std)).mean()


def ddpg_bc(mean: Tensor, a: Tensor, q: Tensor, alpha: float) -> Tensor:
    return -q.mean() / (q.detach().abs().mean() + 1e-6) - alpha * log_prob(mean, a).mean()


def expectile(advantage: Tensor, difference: Tensor, kappa: float) -> Tensor:
    return (torch.where(advantage >= 0, kappa, 1 - kappa) * difference.square()).mean()


def total(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def v_loss(v: list[Tensor], old: list[Tensor], old_next: list[Tensor], hit: Tensor, c: Any) -> Tensor:
    """GCIVL's value loss, from values (B,) of two members."""
    r, m = hit - 1, c.discount * (1 - hit)
    advantage = r + m * torch.minimum(*old_next) - (old[0] + old[1]) / 2
    return total(expectile(advantage, r + m * n - x, c.expectile) for x, n in zip(v, old_next, strict=True))


def gcbc(n: Nets, b: Rows, c: Any) -> Tensor:
    return -log_prob(n["actor"][0](torch.cat([b.s, b.g_a], 1)), b.a).mean()


def gcivl(n: Nets, b: Rows, c: Any) -> Tensor:
    x, x_next = torch.cat([b.s, b.g_v], 1), torch.cat([b.s_next, b.g_v], 1)
    xa, xa_next = torch.cat([b.s, b.g_a], 1), torch.cat([b.s_next, b.g_a], 1)
    with torch.no_grad():
        old, old_next = ([m(y).squeeze(1) for m in n["target_value"]] for y in (x, x_next))
        advantage = (total(m(xa_next) - m(xa) for m in n["value"]) / 2).squeeze(1)
    loss = v_loss([m(x).squeeze(1) for m in n["value"]], old, old_next, b.hit, c)
    return loss + awr(n["actor"][0](xa), b.a, advantage, c.alpha)


def gciql(n: Nets, b: Rows, c: Any) -> Tensor:
    x, xa = torch.cat([b.s, b.g_v], 1), torch.cat([b.s, b.g_a], 1)
    sa, value, critic = torch.cat([x, b.a], 1), n["value"][0], n["critic"]
    with torch.no_grad():
        old = torch.minimum(*(m(sa) for m in n["target_critic"])).squeeze(1)
        y = b.hit - 1 + c.discount * (1 - b.hit) * value(torch.cat([b.s_next, b.g_v], 1)).squeeze(1)
    delta = old - value(x).squeeze(1)
    loss = expectile(delta, delta, c.expectile) + total((m(sa).squeeze(1) - y).square().mean() for m in critic)
    mean = n["actor"][0](xa)
    if c.actor_loss == "awr":
        with torch.no_grad():
            q = torch.minimum(*(m(torch.cat([xa, b.a], 1)) for m in critic))
            advantage = (q - value(xa)).squeeze(1)
        return loss + awr(mean, b.a, advantage, c.alpha)
    best = torch.cat([xa, mean.clamp(-1, 1)], 1)
    q = frozen(critic, lambda: torch.minimum(*(m(best) for m in critic)).squeeze(1))
    return loss + ddpg_bc(mean, b.a, q, c.alpha)


def iqe(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Interval quasimetric embedding in groups of 8."""
    x, y = x.unflatten(1, (-1, 8)), y.unflatten(1, (-1, 8))
    left, order = x.sort(-1)
    right = torch.maximum(x, y).gather(-1, order)
    covered = torch.maximum(left[..., 1:], right.cummax(-1).values[..., :-1])
    length = right[..., 0] - left[..., 0] + torch.relu(right[..., 1:] - covered).sum(-1)
    share = torch.sigmoid(alpha)
    return share * length.mean(1) + (1 - share) * length.amax(1)


def qrl(n: Nets, b: Rows, c: Any) -> Tensor:
    phi, (alpha, log_multiplier) = n["phi"][0], n["scalars"]
    z, z_next, z_goal = phi(b.s), phi(b.s_next), phi(b.g_v)
    constraint = torch.relu(iqe(z, z_next, alpha) - 1).square().mean()
    multiplier = log_multiplier.exp()
    loss = (100 * functional.softplus(5 - iqe(z, z_goal, alpha) / 100)).mean() + multiplier.detach() * constraint
    loss = loss + multiplier * (c.epsilon - constraint.detach())
    mean = n["actor"][0](torch.cat([b.s, b.g_a], 1))
    with torch.no_grad():
        there = phi(b.g_a)
    if c.actor_loss == "awr":
        with torch.no_grad():
            advantage = iqe(z, there, alpha) - iqe(z_next, there, alpha)
        return loss + awr(mean, b.a, advantage, c.alpha)
    model, here = n["dynamics"], z.detach()
    moved = z + model[0](torch.cat([z, b.a], 1))
    loss = loss + (iqe(z_next, moved, alpha) + iqe(moved, z_next, alpha)).mean() / 2
    step = torch.cat([here, mean.clamp(-1, 1)], 1)
    q = -iqe(here + frozen(model, lambda: model[0](step)), there, alpha.detach())
    return loss + ddpg_bc(mean, b.a, q, c.alpha)


def crl(n: Nets, b: Rows, c: Any) -> Tensor:
    root, labels = math.sqrt(c.latent_dim), torch.eye(len(b.s))

    def contrast(phi: Tensor, psi: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(phi @ psi.T / root, labels)

    pairs = list(zip(n["critic_phi"], n["critic_psi"], strict=True))
    sa, mean = torch.cat([b.s, b.a], 1), n["actor"][0](torch.cat([b.s, b.g_a], 1))
    loss = total(contrast(phi(sa), psi(b.g_v)) for phi, psi in pairs) / 2
    with torch.no_grad():
        goals = [psi(b.g_a) for _, psi in pairs]
    if c.actor_loss == "awr":
        value_phi, value_psi = n["value_phi"][0], n["value_psi"][0]
        loss = loss + contrast(value_phi(b.s), value_psi(b.g_v))
        with torch.no_grad():
            q = torch.minimum(*((phi(sa) * psi).sum(1) / root for (phi, _), psi in zip(pairs, goals, strict=True)))
            advantage = q - (value_phi(b.s) * value_psi(b.g_a)).sum(1) / root
        return loss + awr(mean, b.a, advantage, c.alpha)
    best = torch.cat([b.s, mean.clamp(-1, 1)], 1)
    phis = n["critic_phi"]
    q = frozen(phis, lambda: torch.minimum(*((f(best) * p).sum(1) / root for f, p in zip(phis, goals, strict=True))))
    return loss + ddpg_bc(mean, b.a, q, c.alpha)


def hiql(n: Nets, b: Rows, c: Any) -> Tensor:
    value, low, high = n["value"], n["low_actor"][0], n["high_actor"][0]

    def rho(s: Tensor, g: Tensor) -> Tensor:
        x = n["goal_rep"][0](torch.cat([s, g], 1))
        return x / x.norm(dim=1, keepdim=True) * math.sqrt(c.rep_dim)

    def values(nets: nn.ModuleList, s: Tensor, g: Tensor) -> list[Tensor]:
        x = torch.cat([s, rho(s, g)], 1)
        return [m(x).squeeze(1) for m in nets]

    def mean(s: Tensor, g: Tensor) -> Tensor:
        return total(values(value, s, g)) / 2

    with torch.no_grad():
        old, old_next = (values(n["target_value"], s, b.g_v) for s in (b.s, b.s_next))
        low_advantage = mean(b.s_next, b.w) - mean(b.s, b.w)
        high_advantage = mean(b.target, b.g_a) - mean(b.s, b.g_a)
        proposal = rho(b.s, b.target)
    with torch.set_grad_enabled(c.low_actor_rep_grad):
        subgoal = rho(b.s, b.w)
    loss = v_loss(values(value, b.s, b.g_v), old, old_next, b.hit, c)
    loss = loss + awr(low(torch.cat([b.s, subgoal], 1)), b.a, low_advantage, c.low_alpha)
    return loss + awr(high(torch.cat([b.s, b.g_a], 1)), proposal, high_advantage, c.high_alpha)


def hilp(n: Nets, b: Rows, c: Any) -> Tensor:
    phi, critic, value, z = n["phi"], n["skill_critic"], n["skill_value"][0], b.z

    def v(x: Tensor, y: Tensor) -> Tensor:
        return -(x - y).square().sum(1).clamp(min=1e-6).sqrt()

    sz = torch.cat([b.s, z], 1)
    sza = torch.cat([sz, b.a], 1)
    with torch.no_grad():
        old = [[m(x) for x in (b.s, b.s_next, b.g_v)] for m in n["target_phi"]]
        old_v, old_next = [v(x, y) for x, _, y in old], [v(x, y) for _, x, y in old]
        old_q = torch.minimum(*(m(sza).squeeze(1) for m in n["target_skill_critic"]))
        next_v, next_x = value(torch.cat([b.s_next, z], 1)).squeeze(1), phi[0](b.s_next)
    x = [m(b.s) for m in phi]
    loss = v_loss([v(i, m(b.g_v)) for i, m in zip(x, phi, strict=True)], old_v, old_next, b.hit, c)
    y = ((next_x - x[0].detach()) * z).sum(1) + c.discount * next_v
    delta = old_q - value(sz).squeeze(1)
    loss = loss + expectile(delta, delta, c.skill_expectile)
    loss = loss + total((m(sza).squeeze(1) - y).square().mean() for m in critic)
    return loss + awr(n["skill_actor"][0](sz), b.a, delta.detach(), c.alpha, n["log_std"][0].clamp(-5, 2))


LOSSES: Mapping[str, Callable[[Nets, Rows, Any], Tensor]] = {
    "gcbc": gcbc, "gcivl": gcivl, "gciql": gciql, "qrl": qrl, "crl": crl, "hiql": hiql, "hilp": hilp
}  # fmt: skip


# -- data and loop -------------------------------------------------------------------------------------------------------


def features(x: Tensor, frequencies: int) -> Tensor:
    """(N, D) -> (N, D (1 + 2 F)), with sines and cosines of F octaves."""
    phases = [torch.pi * 2.0**k * x for k in range(-1, frequencies - 1)]
    waves = torch.stack(phases, 2).flatten(1) if phases else x[:, :0]
    return torch.cat([x, waves.sin(), waves.cos()], 1)


class Loop:
    """A hand-written training loop of one method; states and goals are of one space, actions in [-1, 1].

    Args:
        method: key of :data:`LOSSES`.
        observations, next_observations: (N, D).
        actions: (N, A).
        final: (N,) last row of each row's episode.
        config: of the agent of this name, resolved.
        rng: draws the batches.
    """

    def __init__(self, method: str, observations: Tensor, next_observations: Tensor, actions: Tensor, final: Tensor,
                 config: Any, rng: torch.Generator):  # fmt: skip
        center, scale = (observations.mean(0), observations.std(0, correction=0)) if config.normalise else (0, 1)
        self.obs, self.next = (
            features((x - center) / scale, config.frequencies) for x in (observations, next_observations)
        )
        self.actions, self.final, self.config, self.rng = actions, final, config, rng
        self.nets, targets = networks(method, self.obs.shape[1], actions.shape[1], config)
        for name in targets:
            self.nets[name].load_state_dict(self.nets[targets[name]].state_dict())
            self.nets[name].requires_grad_(False)
        self.old = list(itertools.chain(*(self.nets[name].parameters() for name in targets)))
        self.new = list(itertools.chain(*(self.nets[name].parameters() for name in targets.values())))
        trained = [p for p in self.nets.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.lr, fused=True)
        self.method, self.loss = method, LOSSES[method]

    def goals(self, i: Tensor, final: Tensor, current: float, trajectory: float, geometric: bool) -> Tensor:
        """Goal rows for rows ``i``; ``trajectory`` is the share among those that are not the row itself."""
        n, c = len(i), self.config
        u = torch.rand(3, n, generator=self.rng)
        if trajectory == 0:
            goal = torch.randint(len(self.obs), (n,), generator=self.rng)
        else:
            if geometric:
                goal = torch.minimum(i + 1 + (torch.log1p(-u[0]) / math.log(c.discount)).long(), final)
            else:
                goal = torch.minimum(i + 1, final)
                goal = goal + torch.round(u[0] * (final - goal)).long()
            if trajectory < 1:
                goal = torch.where(u[1] < trajectory, goal, torch.randint(len(self.obs), (n,), generator=self.rng))
        return torch.where(u[2] < current, i, goal) if current else goal

    def sample(self) -> Rows:
        c = self.config
        i = torch.randint(len(self.obs), (c.batch_size,), generator=self.rng)
        final, s = self.final[i], self.obs[i]
        share = c.value_p_trajectory / (1 - c.value_p_current)
        g = self.goals(i, final, c.value_p_current, share, c.value_geometric)
        shared = {"s": s, "s_next": self.next[i], "a": self.actions[i], "g_v": self.obs[g], "hit": (i == g).float()}
        if self.method == "hilp":
            z = functional.normalize(torch.randn(c.batch_size, c.skill_dim, generator=self.rng))
            return Rows(**shared, g_a=shared["g_v"], z=z)
        g = self.goals(i, final, 0.0, c.actor_p_trajectory, False)
        if self.method != "hiql":
            return Rows(**shared, g_a=self.obs[g])
        w = torch.minimum(i + c.subgoal_steps, final)
        return Rows(**shared, g_a=self.obs[g], w=self.obs[w], target=self.obs[torch.minimum(w, g)])

    def update(self) -> None:
        loss = self.loss(self.nets, self.sample(), self.config)
        self.optimizer.zero_grad()
        loss.backward()
        if self.old:
            torch._foreach_lerp_(self.old, self.new, self.config.tau)
        self.optimizer.step()
