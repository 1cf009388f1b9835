"""Networks of QKFormer as plain `nn.Module`s, registered with timm; the package is `qkformer` once installed."""

from . import released
from .backends import set_lif_backend
from .neuron import LIF
from .qkformer import HierarchicalSpikingTransformer
from .registry import create_model, list_models

__all__ = ["LIF", "HierarchicalSpikingTransformer", "create_model", "list_models", "released", "set_lif_backend"]
