"""Agents: one algorithm, one file. CONTRIBUTING.md says how to add one."""

if __name__ != "clbench.agents":
    raise ImportError("import clbench.agents, not agents: this top-level folder is part of the clbench package")

# name -> ("module:Class", summary)
TABLE: dict[str, tuple[str, str]] = {
    "random": ("clbench.agents.random:RandomAgent", "uniform random actions; the floor of every comparison"),
    "bc": ("clbench.agents.bc:BC", "(goal-conditioned) behaviour cloning; on Classify tasks the plain classifier"),
    "eidetic-bc": (
        "clbench.agents.eidetic_bc:EideticBC",
        "(goal-conditioned) behaviour cloning with zero forgetting by construction (EideticNet)",
    ),
    "eidetic-ppo": (
        "clbench.agents.eidetic_ppo:EideticPPO",
        "Stable-Baselines3 PPO, online, with zero forgetting by construction (EideticNet)",
    ),
    "gcbc": ("clbench.agents.gcbc:GCBC", "goal-conditioned behaviour cloning, offline (OGBench)"),
    "gcivl": ("clbench.agents.gcivl:GCIVL", "goal-conditioned implicit V-learning, offline (OGBench)"),
    "gciql": ("clbench.agents.gciql:GCIQL", "goal-conditioned implicit Q-learning, offline (OGBench)"),
    "qrl": ("clbench.agents.qrl:QRL", "quasimetric RL: IQE or MRN distances, offline (OGBench)"),
    "crl": ("clbench.agents.crl:CRL", "contrastive RL, offline (OGBench)"),
    "hiql": ("clbench.agents.hiql:HIQL", "hierarchical implicit Q-learning, offline (OGBench)"),
    "hilp": ("clbench.agents.hilp:HILP", "Hilbert representation of temporal distances and skills, goal-conditioned"),
    "hilp-zero-shot": (
        "clbench.agents.hilp_zero_shot:HILPZeroShot",
        "Hilbert features and successor features: any goal, or any reward from examples (zero-shot RL)",
    ),
    "pldm": ("clbench.agents.pldm:PLDM", "latent world model from offline data, and planning with it (JEPA, PLDM)"),
    "eidetic-pldm": (
        "clbench.agents.eidetic_pldm:EideticPLDM",
        "latent world model and planning with zero forgetting by construction (PLDM on an EideticNet)",
    ),
    "sb3-ppo": ("clbench.agents.sb3:SB3PPO", "Stable-Baselines3 PPO, online"),
    "sb3-dqn": ("clbench.agents.sb3:SB3DQN", "Stable-Baselines3 DQN, online, with HER for goal observations"),
    "sb3-sac": ("clbench.agents.sb3:SB3SAC", "Stable-Baselines3 SAC, online, with HER for goal observations"),
    "sb3-td3": ("clbench.agents.sb3:SB3TD3", "Stable-Baselines3 TD3, online, with HER for goal observations"),
}

# continual methods that compose with any agent (EWC, replay, ...)
METHODS: dict[str, tuple[str, str]] = {
    "l2": ("clbench.agents.continual.l2:L2", "L2 anchor: stay near the last task's weights"),
    "ewc": (
        "clbench.agents.continual.ewc:EWC",
        "elastic weight consolidation, Fisher by labels sampled from the model",
    ),
    "ewc-exact": ("clbench.agents.continual.ewc:ExactEWC", "elastic weight consolidation, exact Fisher"),
    "ewc-empirical": ("clbench.agents.continual.ewc:EmpiricalEWC", "elastic weight consolidation, empirical Fisher"),
    "ewc-online": ("clbench.agents.continual.ewc:OnlineEWC", "elastic weight consolidation, one decaying Fisher"),
    "si": ("clbench.agents.continual.si:SI", "synaptic intelligence: importance from the path of training"),
    "mas": ("clbench.agents.continual.mas:MAS", "memory aware synapses: importance from the outputs' sensitivity"),
    "packnet": ("clbench.agents.continual.packnet:PackNet", "each task gets some of the weights, frozen for good"),
    "er": ("clbench.agents.continual.er:ER", "experience replay from a reservoir"),
    "er-balanced": ("clbench.agents.continual.er:BalancedER", "experience replay, memory shared among tasks"),
    "derpp": ("clbench.agents.continual.derpp:DERpp", "dark experience replay++: replay of rows and of outputs"),
    "uer": ("clbench.agents.continual.uer:UER", "replay, with cosine logits for what is new"),
    "a-gem": ("clbench.agents.continual.agem:AGEM", "gradients projected so that the loss on the past does not rise"),
    "lwf": ("clbench.agents.continual.lwf:LwF", "distillation from the old network on the new task's data"),
    "clear": ("clbench.agents.continual.clear:CLEAR", "behaviour cloning of stored outputs of finished tasks"),
    "upgd": ("clbench.agents.continual.upgd:WeightUPGD", "utility-based perturbed gradient descent, per weight"),
    "upgd-feature": ("clbench.agents.continual.upgd:FeatureUPGD", "utility-based perturbed gradient descent, per unit"),
    "shrink-perturb": (
        "clbench.agents.continual.shrink_perturb:ShrinkPerturb",
        "weights shrink and are stirred after every update",
    ),
    "shrink-perturb-task": (
        "clbench.agents.continual.shrink_perturb:TaskShrinkPerturb",
        "weights shrink and are stirred at each boundary",
    ),
    "l2-init": ("clbench.agents.continual.l2_init:L2Init", "L2 regularisation towards the initial weights"),
    "redo": ("clbench.agents.continual.redo:ReDo", "dormant hidden units are made anew"),
    "cbp": ("clbench.agents.continual.cbp:CBP", "continual backpropagation: the least useful units are made anew"),
}
