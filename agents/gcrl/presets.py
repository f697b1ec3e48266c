"""Hyperparameters of the offline goal-conditioned agents, by family of data sets.

Sources: OGBench (Park et al. 2025, arXiv 2410.20092), its table of hyperparameters and the commands of its code; HILP
(Park et al. 2024, arXiv 2402.15567); PLDM (Sobal et al. 2025, arXiv 2502.14819), appendix C and J, for ``two-rooms`` and
``diverse-maze``. ``small`` is ours: smaller networks, larger steps, a shorter horizon, normalised inputs and sines and
cosines of them, which thin walls need; ``small-pointmaze`` has OGBench's alphas of its mazes, and thick walls.

``alpha`` means opposite things: with ``awr`` larger is greedier, with ``ddpg-bc`` larger is closer to the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]

REFERENCE: Values = {
    "hidden": (512, 512, 512), "lr": 3e-4, "batch_size": 1024, "discount": 0.99, "tau": 0.005, "normalise": False,
    "frequencies": 0,
    "learn_std": False, "actor_p_trajectory": 1.0, "actor_p_random": 0.0,
}  # fmt: skip
MIXED: Values = {
    "value_p_current": 0.2, "value_p_trajectory": 0.5, "value_p_random": 0.3, "value_geometric": True
}  # fmt: skip
TRAJECTORY: Values = {
    "value_p_current": 0.0, "value_p_trajectory": 1.0, "value_p_random": 0.0, "value_geometric": True
}  # fmt: skip

# what sets each agent apart in the reference
AGENTS: Mapping[str, Values] = {
    "gcbc": {**TRAJECTORY, "value_geometric": False},
    "gcivl": {**MIXED, "expectile": 0.9, "alpha": 10.0},
    "gciql": {**MIXED, "expectile": 0.9, "alpha": 0.3, "actor_loss": "auto"},
    "qrl": {
        "value_p_current": 0.0, "value_p_trajectory": 0.0, "value_p_random": 1.0, "value_geometric": False,
        "alpha": 0.003, "actor_loss": "auto", "latent_dim": 512, "epsilon": 0.05,
    },
    "crl": {**TRAJECTORY, "alpha": 0.1, "actor_loss": "auto", "latent_dim": 512},
    "hiql": {
        **MIXED, "expectile": 0.7, "high_alpha": 3.0, "low_alpha": 3.0, "subgoal_steps": 25, "rep_dim": 10,
    },
    "hilp": {
        "value_p_current": 0.0, "value_p_trajectory": 0.625, "value_p_random": 0.375, "value_geometric": True,
        "expectile": 0.95, "skill_expectile": 0.9, "alpha": 10.0, "skill_dim": 32, "learn_std": True,
    },
    "hilp-zero-shot": {  # the published PyTorch code, its walker
        "value_p_current": 0.0, "value_p_trajectory": 0.625, "value_p_random": 0.375, "value_geometric": True,
        "hidden": (512, 512), "map_hidden": (1024, 512), "lr": 1e-4, "phi_lr": 5e-4, "discount": 0.98,
        "phi_discount": 0.96, "goal_discount": 0.99, "expectile": 0.5, "skill_dim": 50, "successor_tau": 0.01,
        "features": "state", "mix_ratio": 0.5, "q_loss": False, "noise": 0.2, "noise_clip": 0.3, "behaviour": 0.0,
    },
}  # fmt: skip

GIANT: Values = {"discount": 0.995}
PIXELS: Values = {"batch_size": 256, "low_actor_rep_grad": True}
AWR3: Values = {"alpha": 3.0, "actor_loss": "awr"}


def _alphas(
    gcivl: float, gciql: float, qrl: float, crl: float, high: float, low: float, steps: int
) -> dict[str, Values]:
    return {
        "gcivl": {"alpha": gcivl}, "gciql": {"alpha": gciql}, "qrl": {"alpha": qrl}, "crl": {"alpha": crl},
        "hiql": {"high_alpha": high, "low_alpha": low, "subgoal_steps": steps},
    }  # fmt: skip


def _actor_goals(trajectory: float, family: Mapping[str, Values]) -> dict[str, Values]:
    """The same, with the actor's goals of the trajectory with that probability, else of anywhere; not for cloning."""
    share = {"actor_p_trajectory": trajectory, "actor_p_random": 1 - trajectory}
    own = {"actor_p_trajectory": 1.0, "actor_p_random": 0.0}
    return {**family, "": {**family.get("", {}), **share}, "gcbc": {**family.get("gcbc", {}), **own}}


POINTMAZE = _alphas(10, 0.003, 0.0003, 0.03, 3, 3, 25)
ANTMAZE = _alphas(10, 0.3, 0.003, 0.1, 3, 3, 25)
HUMANOID = {"": GIANT, **_alphas(10, 0.1, 0.001, 0.1, 3, 3, 100)}
ANTSOCCER = _alphas(10, 0.1, 0.003, 0.3, 3, 3, 25)
SMALL: Values = {
    "hidden": (128, 128, 128), "lr": 1e-3, "batch_size": 256, "discount": 0.98, "tau": 0.02, "normalise": True,
    "frequencies": 4,
}  # fmt: skip
SMALL_ZERO_SHOT: Values = {
    "hidden": (128, 128), "map_hidden": (256, 128), "phi_lr": 1e-3, "phi_discount": 0.98, "goal_discount": 0.98,
    "expectile": 0.9, "skill_dim": 16, "successor_tau": 0.02, "features": "difference", "behaviour": 0.3,
}  # fmt: skip

# preset -> agent -> values; "" holds for every agent
PRESETS: Mapping[str, Mapping[str, Values]] = {
    "ogbench": {},
    "small": {
        "": SMALL, "qrl": {"latent_dim": 64}, "crl": {"latent_dim": 64}, "hiql": {"subgoal_steps": 15},
        "hilp": {"skill_dim": 16}, "hilp-zero-shot": SMALL_ZERO_SHOT,
    },
    "small-pointmaze": {
        "": {**SMALL, "frequencies": 0}, **_alphas(10, 0.003, 0.0003, 0.03, 3, 3, 15),
        "qrl": {"alpha": 0.0003, "latent_dim": 64}, "crl": {"alpha": 0.03, "latent_dim": 64},
        "hilp": {"skill_dim": 16}, "hilp-zero-shot": SMALL_ZERO_SHOT,
    },
    "reference": {},  # of hilp-zero-shot, whose reference is not OGBench
    "pointmaze": POINTMAZE,
    "pointmaze-giant": {"": GIANT, **POINTMAZE},
    "antmaze": ANTMAZE,
    "antmaze-giant": {"": GIANT, **ANTMAZE},
    "antmaze-explore": _actor_goals(0.0, _alphas(10, 0.01, 0.001, 0.003, 10, 10, 25)),
    "humanoidmaze": HUMANOID,
    "antsoccer": ANTSOCCER,
    "pointmaze-stitch": _actor_goals(0.5, POINTMAZE),
    "pointmaze-giant-stitch": _actor_goals(0.5, {"": GIANT, **POINTMAZE}),
    "antmaze-stitch": _actor_goals(0.5, ANTMAZE),
    "antmaze-giant-stitch": _actor_goals(0.5, {"": GIANT, **ANTMAZE}),
    "humanoidmaze-stitch": _actor_goals(0.5, HUMANOID),
    "antsoccer-stitch": _actor_goals(0.5, ANTSOCCER),
    "manipulation-play": _alphas(10, 1, 0.3, 3, 3, 3, 10),
    "manipulation-noisy": _alphas(10, 0.03, 0.03, 0.1, 3, 3, 10),
    "powderworld": {
        "": PIXELS, "gcivl": {"alpha": 3.0}, "gciql": AWR3, "qrl": AWR3, "crl": AWR3, "hiql": {"subgoal_steps": 10}
    },
    "two-rooms": {
        "": PIXELS, "gciql": {"expectile": 0.7}, "hiql": {"expectile": 0.7},
        "hilp": {"expectile": 0.7, "skill_expectile": 0.7},
    },
    "diverse-maze": {  # PLDM's table for 5 training layouts
        "": PIXELS, "gciql": {"lr": 2e-4, "expectile": 0.8}, "hiql": {"lr": 1e-4, "expectile": 0.7},
        "hilp": {"lr": 1e-4, "expectile": 0.9, "skill_expectile": 0.9},
    },
}  # fmt: skip


def preset_of(agent: str, preset: str) -> dict[str, Any]:
    """All values of an agent: the reference's, its own, and what the preset changes."""
    family = PRESETS[preset]
    return {**REFERENCE, **AGENTS[agent], **family.get("", {}), **family.get(agent, {})}
