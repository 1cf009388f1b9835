"""QKFormer's networks as plain `nn.Module`s; importing this package also registers them with timm."""

from .hst import HierarchicalSpikingTransformer, create_model, list_models
from .neuron import LIF, set_lif_backend

__all__ = ["LIF", "HierarchicalSpikingTransformer", "create_model", "list_models", "set_lif_backend"]
