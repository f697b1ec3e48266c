from dataclasses import dataclass

from clbench.planners.sampling import SamplingConfig, SamplingPlanner, elites


class HalfWay(SamplingPlanner):
    """Goes half way to the cheapest of the drawn sequences, and draws closer to it each time."""

    @dataclass
    class Config(SamplingConfig):
        shrink: float = 0.7

    def update(self, state, candidates, costs):
        best = elites(candidates, costs, 1)[:, :, 0].transpose(0, 1)  # (T, B, A) -> (B, T, A)
        return {"mean": state["mean"].lerp(best, 0.5), "std": state["std"] * self.config.shrink}
