"""Layers, networks and tools of Eidetic Learning; docs/eidetic.md explains them. ::

from clbench.agents.networks import eidetic
"""

from clbench.agents.networks.eidetic.layers import (
    Activation,
    BatchNorm,
    Conv2d,
    Embedding,
    GRUCell,
    Heads,
    Linear,
    MultiheadAttention,
    PrefixNorm,
)
from clbench.agents.networks.eidetic.network import Capacity, EideticNetwork
from clbench.agents.networks.eidetic.ownership import FREE, INPUT, Axis, OwnedParameter, Space
from clbench.agents.networks.eidetic.pruning import Pruner, Pruning, importance
from clbench.agents.networks.eidetic.verify import Evidence, verify

__all__ = [
    "FREE", "INPUT", "Activation", "Axis", "BatchNorm", "Capacity", "Conv2d", "EideticNetwork", "Embedding", "Evidence",
    "GRUCell", "Heads", "Linear", "MultiheadAttention", "OwnedParameter", "PrefixNorm", "Pruner", "Pruning", "Space",
    "importance", "verify",
]  # fmt: skip
