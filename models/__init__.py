"""QKFormer's networks as plain `nn.Module`s; importing this package also registers them with timm."""

from .neuron import LIF, set_lif_backend
from .qkformer import HierarchicalSpikingTransformer, create_model, list_models

__all__ = ["LIF", "HierarchicalSpikingTransformer", "create_model", "list_models", "set_lif_backend"]
