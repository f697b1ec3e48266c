"""HILP for zero-shot RL: Hilbert features, and successor features of them (Park et al. 2024, arXiv 2402.15567).

One policy for every reward that is linear in the features f = phi_1 - mu, mu the running mean of phi_1; z is the task::

    phi:    V_j(s, g) = -|phi_j(s) - phi_j(g)|, trained as in ``hilp``
    F:      F_h(s, z, a) is the discounted sum of features to come, h = 1, 2
            y   = f + gamma F'_h(s', z, a'),   a' of pi(s', z),   h the head with the smaller F'_h z, per row
            L_F = sum_h E[ mean_i (F_h - y)_i^2 ],   or sum_h E[ (F_h z - y z)^2 ]
    pi:     L_pi = -E[ min_h F_h(s, z, a) z ],   a of pi(s, z)
    z:      a random direction, or for a share of the rows that of f(s'_k) pinv(E[f f^T]), k any row; of length sqrt(d)

Features of a transition are f(s') (``state``) or f(s') - f(s) (``difference``). To reach g, follow the direction of
``f(g) - f(s)``, computed anew at every step; to avoid it, the opposite one. For a reward, :meth:`HILPZeroShot.prompt`.
Where states have more than goals do (velocities), the features are of what is achieved.

What differs from the published code: one step of Adam on the sum of the losses, so that the policy sees F as it was before
the step; target features begin as a copy (there, as other random features); a goal is reached by the row of the data that
it is, not by any row within 1e-6; pictures are encoded by ``impala_small``; features of the kind ``concat`` are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from clbench.agents.gcivl import implicit_v_loss
from clbench.agents.gcrl.base import GoalAgent, GoalBatch, GoalConfig
from clbench.agents.gcrl.losses import detached
from clbench.agents.gcrl.networks import Distribution, Gaussian, ImpalaSmall, Input, Shape, stack_rows
from clbench.agents.hilp import hilbert_value, random_skills
from clbench.contracts import Spaces, TaskInfo
from clbench.data.dataset import GoalSampling, OfflineDataset
from clbench.errors import ConfigError

MEAN_STEP = 0.005  # of the running mean of features
LARGEST = 1 - 1e-6  # action


# -- networks ------------------------------------------------------------------------------------------------------------


def linear(n_in: int, n_out: int, rng: torch.Generator) -> nn.Linear:
    """A linear layer, orthogonal weight and zero bias."""
    layer = nn.Linear(n_in, n_out, device="meta").to_empty(device="cpu")  # no draw from the global generator
    draw = torch.empty(layer.weight.shape, device=rng.device)
    with torch.no_grad():
        layer.weight.copy_(nn.init.orthogonal_(draw, generator=rng))
    nn.init.zeros_(layer.bias)
    return layer


def tower(sizes: Sequence[int], rng: torch.Generator) -> list[nn.Module]:
    """Dense, LayerNorm, tanh for the first layer; dense, relu for the others."""
    layers: list[nn.Module] = [linear(sizes[0], sizes[1], rng), nn.LayerNorm(sizes[1]), nn.Tanh()]
    for n_in, n_out in zip(sizes[1:-1], sizes[2:], strict=True):
        layers += [linear(n_in, n_out, rng), nn.ReLU()]
    return layers


class Front(nn.Module):
    """An :class:`Input` as numbers (B, n): its own, after the features of its image if it has one."""

    def __init__(self, shape: Shape, rng: torch.Generator):
        super().__init__()
        self.encoder = None if shape.image is None else ImpalaSmall(shape.image, rng=rng)
        self.size = shape.flat + (0 if self.encoder is None else self.encoder.size)

    def forward(self, x: Input) -> Tensor:
        parts = [] if x.flat is None else [x.flat]
        if self.encoder is not None and x.image is not None:
            parts.insert(0, self.encoder(x.image))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class HilbertFeatures(nn.Module):
    """phi_1 and phi_2: a state or goal -> (2, B, d). The features of the paper are phi_1, centred on a running mean."""

    mean: Tensor

    def __init__(self, shape: Shape, hidden: Sequence[int], size: int, rng: torch.Generator):
        super().__init__()
        self.front = Front(shape, rng)
        sizes = (self.front.size, *hidden)
        self.members = nn.ModuleList(nn.Sequential(*tower(sizes, rng), linear(sizes[-1], size, rng)) for _ in range(2))
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, x: Input) -> Tensor:
        inputs = self.front(x)
        return torch.stack([member(inputs) for member in self.members])

    @torch.no_grad()
    def first(self, x: Input) -> Tensor:
        """phi_1 (B, d), not centred, without gradient."""
        return self.members[0](self.front(x))


class TwoTowers(nn.Module):
    """[s; a] and [s; z], each through a tower; both side by side through every head: (heads, B, outputs).

    Args:
        shape: of states.
        inputs: numbers beside the state in the one tower.
        task: numbers in z.
        hidden: sizes of a tower.
        heads, outputs: how many heads, and numbers of each.
    """

    def __init__(self, shape: Shape, inputs: int, task: int, hidden: Sequence[int], heads: int, outputs: int,
                 rng: torch.Generator):  # fmt: skip
        super().__init__()
        self.front = Front(shape, rng)
        self.left = nn.Sequential(*tower((self.front.size + inputs, *hidden), rng))
        self.right = nn.Sequential(*tower((self.front.size + task, *hidden), rng))
        width = 2 * hidden[-1]
        self.heads = nn.ModuleList(
            nn.Sequential(linear(width, width, rng), nn.ReLU(), linear(width, outputs, rng)) for _ in range(heads)
        )

    def forward(self, s: Input, z: Tensor, a: Tensor | None = None) -> Tensor:
        """(B, ...), (B, d), (B, A) -> (heads, B, outputs)."""
        x = self.front(s)
        both = [self.left(x if a is None else torch.cat([x, a], 1)), self.right(torch.cat([x, z], 1))]
        h = torch.cat(both, 1)
        return torch.stack([head(h) for head in self.heads])

    def frozen(self, s: Input, z: Tensor, a: Tensor) -> Tensor:
        """The same; the gradient reaches ``a``, but not the parameters."""
        return functional_call(self, {k: p.detach() for k, p in self.named_parameters()}, (s, z, a))


# -- policy --------------------------------------------------------------------------------------------------------------


def keep_within(a: Tensor) -> Tensor:
    """Actions within +-(1 - 1e-6); the gradient is that of the identity."""
    return a + (a.clamp(-LARGEST, LARGEST) - a).detach()


@dataclass(frozen=True)
class TruncatedNormal(Gaussian):
    """Normal noise around the mean, results kept within [-1, 1]; ``log_prob`` is that of the normal distribution."""

    def perturbed(self, noise: Tensor, clip: float) -> Tensor:
        """The mean with standard normal ``noise`` (B, A), scaled to the deviation and cut to ``+-clip``."""
        return keep_within(self.mean + (self.std * noise).clamp(-clip, clip))

    def sample(self, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        return keep_within(super().sample(rng, temperature))


# -- tasks ---------------------------------------------------------------------------------------------------------------


def task_vector(direction: Tensor) -> Tensor:
    """(..., d) -> the same direction, of length sqrt(d)."""
    return math.sqrt(direction.shape[-1]) * functional.normalize(direction, dim=-1)


def draw_tasks(f: Tensor, mix_ratio: float, rng: torch.Generator) -> Tensor:
    """Random tasks, of which a share are those that the features of other rows stand for.

    Args:
        f: (B, d), features of next states.
        mix_ratio: probability of ``sqrt(d)`` times the direction of ``f_k pinv(E[f f^T])`` for a row k, in place of any.
        rng: draws.

    Returns:
        (B, d), each of length sqrt(d).
    """
    count, dim = f.shape
    z = random_skills(count, dim, f.device, rng) * math.sqrt(dim)
    order = torch.randperm(count, generator=rng, device=rng.device).to(f.device)
    coin = torch.rand(count, 1, generator=rng, device=rng.device).to(f.device)
    inverse = torch.linalg.pinv(f.T @ f / count, hermitian=True)
    return torch.where(coin < mix_ratio, task_vector(f[order] @ inverse), z)


def infer_task(f: Tensor, rewards: Tensor) -> Tensor:
    """The task whose reward ``f z`` is nearest to ``rewards`` by least squares: (B, d), (B,) -> (d,) of length sqrt(d)."""
    solution = torch.linalg.lstsq(f.to("cpu", torch.float64), rewards.reshape(-1, 1).to("cpu", torch.float64)).solution
    return task_vector(solution[:, 0]).to(f.device, f.dtype)


# -- agent ---------------------------------------------------------------------------------------------------------------


class HILPZeroShot(GoalAgent):
    """Hilbert features, and a policy for every reward that is linear in them.

    Raises:
        ConfigError: discrete actions.
    """

    requires = frozenset({"dataset", "goal", "continuous"})

    @dataclass
    class Config(GoalConfig):
        """Options, beside those of :class:`GoalConfig`; ``hidden`` are the hidden layers of phi.

        Args:
            preset: ``small`` (ours, for a CPU; ``small-pointmaze`` is the same) or ``reference`` (the published code).
            map_hidden: layers of the towers of F and of the policy.
            phi_lr: learning rate of phi; ``lr`` is that of F and the policy.
            skill_dim: d.
            expectile: kappa of phi.
            phi_discount: of phi; ``discount`` is that of F.
            goal_discount: of the distance of phi's goals.
            tau: step of phi's target.
            successor_tau: step of F's target.
            features: of a transition, those of its next state, or their change.
            mix_ratio: share of tasks drawn from the data.
            q_loss: fit F z alone, not all of F.
            noise, noise_clip: standard deviation of the policy's noise in training, and its largest size.
            behaviour: weight of cloning the actions of the data; 0 in the paper.
        """

        preset: Literal["small", "small-pointmaze", "reference"] = "small"  # type: ignore[assignment]
        map_hidden: tuple[int, ...] | None = None
        phi_lr: float | None = None
        skill_dim: int | None = None
        expectile: float | None = None
        phi_discount: float | None = None
        goal_discount: float | None = None
        tau: float | None = None
        successor_tau: float | None = None
        features: Literal["state", "difference"] | None = None
        mix_ratio: float | None = None
        q_loss: bool | None = None
        noise: float | None = None
        noise_clip: float | None = None
        behaviour: float | None = None
        agent = "hilp-zero-shot"

        @property
        def value_sampling(self) -> GoalSampling:
            return dataclasses.replace(super().value_sampling, discount=self.goal_discount)

    targets = {"target_phi": "phi", "target_successor": "successor"}
    avoids = True
    graphs = False  # pinv waits for the GPU
    phi: HilbertFeatures
    target_phi: HilbertFeatures
    successor: TwoTowers
    target_successor: TwoTowers
    actor: TwoTowers

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self.prompted: Tensor | None = None  # (d,): the task of a reward, followed in place of goals

    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        if self.discrete:
            raise ConfigError(
                f"Agent {self.name!r} follows the gradient of its critic through continuous actions, but the action space "
                f"is {self.spaces.action}; use hilp, which also takes discrete ones."
            )
        config, state, dim = self.config, self.inputs.state_shape, self.config.skill_dim
        hidden, size = config.map_hidden, self.action_size
        return {
            "phi": HilbertFeatures(self.inputs.goal_shape, config.hidden, dim, rng),
            "successor": TwoTowers(state, size, dim, hidden, 2, dim, rng),
            "actor": TwoTowers(state, 0, dim, hidden, 1, size, rng),
        }

    # -- learning ---------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        """Forgets a prompt: the features that it was made for change."""
        super().start_task(task)
        self.prompted = None

    def sample(self, data: OfflineDataset, rng: torch.Generator) -> GoalBatch:
        """No goals for the actor, but for every row a task and the noise of two actions."""
        index = data.sample_index(self.config.batch_size, rng)
        goal = data.sample_goals(index, self.config.value_sampling, rng)
        batch = self.batch(data, index, goal, goal)
        f = self.phi.first(batch.achieved_next) - self.phi.mean
        size = (2, len(index), self.action_size)
        noise, noise_next = torch.randn(size, generator=rng, device=rng.device).to(self.device)
        more = {"z": draw_tasks(f, self.config.mix_ratio, rng), "noise": noise, "noise_next": noise_next}
        return dataclasses.replace(batch, more={k: Input(v) for k, v in more.items()})

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        phi_loss, v = self.phi_loss(batch)
        successor_loss = self.successor_loss(batch)
        actor_loss, q = self.actor_loss(batch)
        loss = phi_loss + successor_loss + actor_loss
        terms = {"phi_loss": phi_loss, "successor_loss": successor_loss, "actor_loss": actor_loss}
        return loss, detached({"loss": loss, **terms, "v": v.mean(), "q": q.mean()})

    def phi_loss(self, batch: GoalBatch) -> tuple[Tensor, Tensor]:
        """Of the features, and V (2, B)."""
        config = self.config
        with torch.no_grad():
            x, x_next, y = self.target_phi(stack_rows(batch.achieved, batch.achieved_next, batch.g_v)).chunk(3, 1)
            target_v, target_next = hilbert_value(x, y), hilbert_value(x_next, y)
        x, y = self.phi(stack_rows(batch.achieved, batch.g_v)).chunk(2, 1)
        v = hilbert_value(x, y)
        args = (batch.at_goal, config.phi_discount, config.expectile)
        return implicit_v_loss(v, target_v, target_next, *args), v

    @torch.no_grad()
    def features(self, achieved: Input, achieved_next: Input) -> Tensor:
        """Of transitions (B, d)."""
        here, there = self.phi.first(stack_rows(achieved, achieved_next)).chunk(2)
        return there - here if self.config.features == "difference" else there - self.phi.mean

    def successor_loss(self, batch: GoalBatch) -> Tensor:
        """Of the successor features; no gradient into the features or the policy."""
        z, noise = _flat(batch, "z"), _flat(batch, "noise_next")
        with torch.no_grad():
            a_next = self.pi(batch.s_next, z).perturbed(noise, self.config.noise_clip)
            following = self.target_successor(batch.s_next, z, a_next)  # (2, B, d)
            worst = (following * z).sum(-1).argmin(0)
            chosen = following[worst, torch.arange(len(z), device=z.device)]
            y = self.features(batch.achieved, batch.achieved_next) + self.config.discount * chosen
        error = self.successor(batch.s, z, batch.a) - y
        if self.config.q_loss:
            return (error * z).sum(-1).square().mean(1).sum()
        return error.square().mean((1, 2)).sum()

    def actor_loss(self, batch: GoalBatch) -> tuple[Tensor, Tensor]:
        """Of the policy, and Q (B,); no gradient into the successor features."""
        z, policy = _flat(batch, "z"), self.pi(batch.s, _flat(batch, "z"))
        a = policy.perturbed(_flat(batch, "noise"), self.config.noise_clip)
        q = (self.successor.frozen(batch.s, z, a) * z).sum(-1).amin(0)
        loss = -q.mean()
        if self.config.behaviour:
            # relative to the size of Q, as in TD3+BC (Fujimoto & Gu 2021)
            cloning = (policy.mean - batch.a).square().sum(-1).mean()
            loss = loss + self.config.behaviour * q.detach().abs().mean() * cloning
        return loss, q

    def update(self, batch: GoalBatch) -> dict[str, Tensor]:
        """One step of Adam; phi's target moves before it, F's target after it."""
        mean = self.phi.first(batch.achieved).mean(0)
        info = super().update(batch)
        self.phi.mean.lerp_(mean, MEAN_STEP)
        self._follow("target_successor", self.config.successor_tau)
        return info

    def update_targets(self) -> None:
        self._follow("target_phi", self.config.tau)

    @torch.no_grad()
    def _follow(self, target: str, tau: float) -> None:
        old, new = (tuple(self.networks[name].parameters()) for name in (target, self.targets[target]))
        torch._foreach_lerp_(old, new, tau)

    def new_optimizer(self) -> torch.optim.Adam:
        maps = [*self.successor.parameters(), *self.actor.parameters()]
        groups = [
            {"params": maps, "lr": self.config.lr},
            {"params": [*self.phi.parameters()], "lr": self.config.phi_lr},
        ]
        return torch.optim.Adam(groups, fused=True)

    # -- acting -----------------------------------------------------------------------------------------------------

    def pi(self, s: Input, z: Tensor) -> TruncatedNormal:
        """The policy for tasks z (B, d)."""
        mean = torch.tanh(self.actor(s, z)[0])
        return TruncatedNormal(mean, mean.new_full(mean.shape[-1:], math.log(self.config.noise)))

    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float,
               sign: Tensor | None = None) -> Distribution:  # fmt: skip
        if self.prompted is not None:
            return self.pi(s, self.prompted.expand(s.rows, -1))
        here, there = self.phi.first(stack_rows(achieved, g)).chunk(2)
        z = task_vector(there - here)
        return self.pi(s, z if sign is None else sign * z)

    @torch.no_grad()
    def prompt(self, observations: Any, rewards: Tensor, next_observations: Any = None) -> Tensor:
        """Follow from now on the task that explains ``rewards``, in place of goals; ``agent.prompted = None`` ends that.

        Args:
            observations: of ``B`` states, as the environment gives them; the states that the rewards are of, or with
                ``features="difference"`` those before.
            rewards: (B,); the paper draws 10,000 transitions.
            next_observations: the states after them, for ``features="difference"``.

        Returns:
            z (d,), of length sqrt(d).

        Raises:
            ConfigError: no ``next_observations``, where features are differences.
        """
        f = self.phi.first(self._achieved(observations))
        if self.config.features == "state":
            f = f - self.phi.mean
        elif next_observations is None:
            raise ConfigError(
                'Features of transitions are differences (features="difference"): prompt also needs the observations after '
                "the transitions, next_observations."
            )
        else:
            f = self.phi.first(self._achieved(next_observations)) - f
        self.prompted = infer_task(f, rewards)
        return self.prompted

    def _achieved(self, observations: Any) -> Input:
        return self.inputs.state(observations) if self.inputs.same else self.inputs.goal(observations["achieved_goal"])

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        prompted = None if self.prompted is None else self.prompted.clone()
        return {**super().state_dict(), "prompted": prompted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        prompted = state["prompted"]
        self.prompted = None if prompted is None else prompted.to(self.device, copy=True)


def _flat(batch: GoalBatch, name: str) -> Tensor:
    """What :meth:`HILPZeroShot.sample` has drawn."""
    value = batch.more[name].flat
    assert value is not None
    return value
