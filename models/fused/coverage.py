"""Safety check of the fused path, which replaces modules only if they have no hooks and no changes."""

import functools
from collections.abc import Callable
from operator import itemgetter
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from ..attention import ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from ..embed import SPEDS
from ..layers import Chain, DropPath, SpikingConv, SpikingMLP
from ..neuron import LIF
from ..qkformer import Block, HierarchicalSpikingTransformer

ATTENTIONS = (TokenQKAttention, ChannelQKAttention, SpikingSelfAttention)
KINDS = (*ATTENTIONS, Block, SPEDS, SpikingConv, SpikingMLP, Chain, LIF, DropPath, nn.ModuleList, nn.Identity)
KINDS += (nn.Conv1d, nn.Conv2d, nn.MaxPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NUMBERS = ("eps", "momentum", "scale", "rate")
FOLLOWED = dict.fromkeys(NUMBERS, (int, float))  # attributes that the fused path reads, and their types
FOLLOWED |= {"training": (bool,), "grad_checkpointing": (bool,), "function": (FunctionType,)}
NAMES = ("__call__", "_call_impl", "forward", "attend", "parts", "units", "_over_time", "charge")
NAMES += ("_conv_forward", "_check_input_dim")
METHODS = [(kind, name) for kind in KINDS for name in NAMES if hasattr(kind, name)]


def _methods() -> list:
    return [getattr(kind, name) for kind, name in METHODS]


UNPATCHED = _methods()


class Coverage:
    """Result of the safety check for a network, and a copy of everything that the result depends on."""

    function: Callable | None = None  # of all neurons; None if the modules must compute
    trains = False  # BatchNorm uses the batch's statistics
    drops = False  # stochastic depth scales spikes

    def __init__(self, model: HierarchicalSpikingTransformer):
        self.modules = list(model.stages.modules())
        attributes = list(map(vars, self.modules))
        inner = [each[name] for each in attributes for name in ("_modules", "_parameters", "_buffers") if each[name]]
        self.dicts = attributes + inner
        self.copies = list(map(dict, self.dicts))
        self.hooks = [each[name] for each in attributes for name in HOOKS]
        self.tensors = [tensor for m in self.modules for tensor in _tensors(m).values()]
        self.numbers = [(itemgetter(name), [each for each in attributes if name in each]) for name in NUMBERS]
        self.state = self._state()
        expected = list(_as_built(tuple(model.arguments.items()))[: len(model.stages)].modules())
        is_known = not _has_any_global_hook() and _methods() == UNPATCHED and len(self.modules) == len(expected)
        if is_known and all(map(_matches, self.modules, expected)):
            functions = {m.function for m in self.modules if type(m) is LIF}
            modes = {m.training for m in self.modules if isinstance(m, _BatchNorm)}
            self.function = functions.pop() if len(functions) == len(modes) == 1 else None
            self.trains = modes.pop()
            self.drops = any(m.rate for m in self.modules if type(m) is DropPath)

    def holds(self, stages: nn.ModuleList) -> bool:
        """Return whether the network is unchanged. Loops run in C, because one in Python takes longer than a kernel."""
        try:
            return stages is self.modules[0] and self.dicts == self.copies and self._state() == self.state
        except Exception:  # comparing tensors may raise
            return False

    def _state(self) -> tuple:
        """Return the state that a comparison of dictionaries misses."""
        return (
            any(self.hooks) or bool(_has_any_global_hook()),
            list(map(type, self.modules)),
            [set(map(type, map(get, owners))) for get, owners in self.numbers],  # 1.0 equals a tensor of 1.0
            list(map(Tensor.size, self.tensors)),  # `.data` can be replaced
            list(map(Tensor.stride, self.tensors)),
            _methods(),
        )


@functools.cache
def _as_built(arguments: tuple[tuple[str, object], ...]) -> nn.ModuleList:
    """Return the stages of a new network on the meta device."""
    with torch.device("meta"):
        return HierarchicalSpikingTransformer(**dict(arguments)).stages


def _matches(m: nn.Module, expected: nn.Module) -> bool:
    """Return whether a module has no hooks or patches and equals `expected`, except for `FOLLOWED` attributes."""
    kind, attributes, tensors = type(m), vars(m), _tensors(m).values()
    is_synchronised = kind is nn.SyncBatchNorm and isinstance(expected, _BatchNorm)
    return (
        (kind is type(expected) or is_synchronised)
        and kind in KINDS
        and list(m._modules) == list(expected._modules)
        and _shapes(m) == _shapes(expected)
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.is_contiguous() for tensor in tensors if tensor.dim() == 1)
        and not any(attributes[name] for name in HOOKS)
        and not any(hasattr(kind, name) for name in attributes)
        and all(_follows(name, attributes.get(name), value) for name, value in vars(expected).items())
    )


def _follows(name: str, value: object, expected: object) -> bool:
    """Return whether the fused path gives equal results with this value of an attribute."""
    if name in FOLLOWED:
        return type(value) in FOLLOWED[name]
    return name.startswith("_") or (type(value) is type(expected) and value == expected)


def _tensors(m: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in (m._parameters | m._buffers).items() if tensor is not None}


def _shapes(m: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _tensors(m).items()}
