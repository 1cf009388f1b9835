"""QKFormer networks as plain `nn.Module`s, registered with timm; pip installs them as the package `qkformer`."""

from . import released
from .backends import set_lif_backend
from .neuron import LIF
from .qkformer import HierarchicalSpikingTransformer
from .registry import create_model, list_models

__all__ = ["LIF", "HierarchicalSpikingTransformer", "create_model", "list_models", "released", "set_lif_backend"]
