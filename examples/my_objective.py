from clbench.agents.pldm import PLDM


class After:
    """A cost that counts only after some steps, so that the way there is free."""

    def __init__(self, cost, steps):
        self.cost, self.steps = cost, steps

    def __call__(self, z, step):  # latents (B, K, *latent) after `step` actions -> costs (B, K)
        return self.cost(z, step) * float(step > self.steps)

    def select(self, rows):  # optional: lets some environments be planned for without the others
        return After(self.cost.select(rows), self.steps)


class LatePLDM(PLDM):
    """PLDM that wants to be at the goal in the second half of its plan."""

    def objective(self, goal, obs=None):
        return After(super().objective(goal, obs), self.planner_config.horizon // 2)
