"""A new task without training: agents that know Two-Rooms keep away from a chaser (PLDM, arXiv 2502.14819, figure 5b).

    python scripts/two_rooms_chase.py [--seeds 0,1,2] [--out runs/two-rooms-chase]

Runs the stream two-rooms-chase with `pldm`, with random actions and without any, and prints the share of episodes in
which the agent is not caught, with 95 % intervals over seeds, beside the paper's. Where the two start and how the paper's
chaser finds its way is not published, so the orders of magnitude can be compared, no more. Give the command again to go on
after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import clbench
from clbench.contracts import Agent, Experience
from clbench.metrics.statistics import summarise
from clbench.report.markdown import interval_text
from clbench.rng import numpy_generator
from clbench.streams.two_rooms_chase import SPEEDS

# success, read off the figure
PAPER = {
    "pldm": (0.72, 0.41, 0.20, 0.054, 0.015, 0.006), "random": (0.22, 0.022, 0.003, 0.0, 0.001, 0.012),
    "still": (0.094, 0.002, 0.0, 0.0, 0.0, 0.0),
}  # fmt: skip


class Still(Agent):
    """Never moves."""

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        yield {"step": budget}

    def act(self, obs: Any, memory: Any, first: torch.Tensor, *, rng: torch.Generator, task: torch.Tensor | None = None,
            explore: bool = False) -> tuple[torch.Tensor, Any]:  # fmt: skip
        return torch.zeros(len(first), 2, device=self.device), memory

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def scores(agent: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Success after training, by task."""
    result = clbench.run(
        "two-rooms-chase", Still if agent == "still" else agent, seed=seed, budget=arguments.budget, eval_every=0,
        device=arguments.device, agent_options={"preset": arguments.preset} if agent == "pldm" else {},
        stream_options={"observation": arguments.observation, "episodes": arguments.episodes},
        out=arguments.out / arguments.observation / agent / f"seed-{seed}",
    )  # fmt: skip
    return dict(zip(result.results["tasks"], result.results["matrix"][-1], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", type=int, default=10_000, help="updates")
    parser.add_argument("--observation", default="state", choices=("state", "pixels"))
    parser.add_argument("--preset", default="small", help="of pldm")
    parser.add_argument("--episodes", type=int, default=100, help="per speed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/two-rooms-chase"))
    arguments = parser.parse_args()
    seeds = [int(s) for s in arguments.seeds.split(",")]
    rows = {"reach": None, **{f"chase-{speed:g}": i for i, speed in enumerate(SPEEDS)}}
    print("| agent | " + " | ".join(rows) + " |\n" + "|---" * (len(rows) + 1) + "|")
    for agent, paper in PAPER.items():
        found = [scores(agent, seed, arguments) for seed in seeds]
        cells = []
        for task, column in rows.items():
            rng = numpy_generator(0, "two-rooms-chase", agent, task)
            text = interval_text(summarise([run[task] for run in found], rng))
            cells.append(text if column is None else f"{text} (paper {paper[column]:.2f})")
        print(f"| {agent} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
