"""QKFormer's networks as plain `nn.Module`s; importing this package also registers them with timm.

In the repository it is `models`; installed with pip it is `qkformer`.
"""

from . import released
from .backends import set_lif_backend
from .neuron import LIF
from .qkformer import HierarchicalSpikingTransformer
from .registry import create_model, list_models

__all__ = ["LIF", "HierarchicalSpikingTransformer", "create_model", "list_models", "released", "set_lif_backend"]
