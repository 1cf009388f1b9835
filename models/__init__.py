"""QKFormer's networks as plain `nn.Module`s; importing this package also registers them with timm."""

from .backends import set_lif_backend
from .neuron import LIF
from .qkformer import HierarchicalSpikingTransformer
from .registry import create_model, list_models

__all__ = ["LIF", "HierarchicalSpikingTransformer", "create_model", "list_models", "set_lif_backend"]
