"""When the fused path may replace the modules: each is as this project builds it, and nothing watches or changes it."""

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from ..attention import ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from ..embed import SPEDS
from ..layers import DropPath, SpikingConv, SpikingMLP
from ..neuron import ATTN_THRESHOLD, LIF, THRESHOLD
from ..qkformer import Block
from .plan import is_linear

CONVS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
ATTENTIONS = (TokenQKAttention, ChannelQKAttention, SpikingSelfAttention)
QK = {"lif": (nn.Identity,), "q": (SpikingConv,), "k": (SpikingConv,), "attn_lif": (LIF,), "proj": (SpikingConv,)}
CHILDREN = {  # kind -> children and their kinds
    SPEDS: {"lif": (nn.Identity,), "units": (nn.ModuleList,)},  # and perhaps a shortcut
    SpikingConv: {"conv": CONVS, "bn": NORMS, "pool": (nn.Identity, nn.MaxPool2d), "lif": (LIF,)},
    TokenQKAttention: QK,
    ChannelQKAttention: QK,
    SpikingSelfAttention: QK | {"v": (SpikingConv,)},
    SpikingMLP: {"lif": (nn.Identity,), "fc1": (SpikingConv,), "fc2": (SpikingConv,)},
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
WINDOW = ("kernel_size", "stride", "padding", "dilation")
ATTRIBUTES = {  # kind -> what of it the answer depends on
    **dict.fromkeys(CONVS, (*WINDOW, "groups", "padding_mode")),
    **dict.fromkeys(NORMS, ("training", "momentum", "track_running_stats", "num_features")),
    nn.MaxPool2d: (*WINDOW, "ceil_mode", "return_indices"),
    LIF: ("function", "threshold", "leak_across_batch"),
    SpikingSelfAttention: ("scale",),
}
PLAIN = (int, float, str, tuple, FunctionType)  # of attributes; networks with a tensor, say, are left to the modules
KINDS = (*CONVS, *NORMS, *ATTENTIONS, SPEDS, SpikingConv, SpikingMLP, DropPath, LIF, nn.MaxPool2d, nn.Identity)
METHODS = [(kind, name) for kind in KINDS for name in ("__call__", "forward", "attend") if hasattr(kind, name)]
UNPATCHED = [getattr(kind, name) for kind, name in METHODS]


class Covered(NamedTuple):
    """Whether the fused path covers a network, and how the network is set."""

    function: Callable | None  # of all neurons; None: the modules compute
    trains: bool = False  # BatchNorm takes the statistics of the batch


class Coverage:
    """The answer for the stages of one network, kept until something changes that it depends on."""

    def __init__(self):
        self.state = None

    def of(self, stages: nn.ModuleList) -> Covered:
        """The answer; `stages` are those of every call, or those that replaced them."""
        if self.state is None or stages is not self.modules[0] or not self._is_unchanged():
            self.modules = list(stages.modules())
            self.attributes = list(map(vars, self.modules))
            self.children = [attributes["_modules"] for attributes in self.attributes]
            self.hooks = [attributes[name] for attributes in self.attributes for name in HOOKS]
            norms = [module for module in self.modules if isinstance(module, _BatchNorm)]
            self.tensors = [tensors for norm in norms for tensors in (norm._parameters, norm._buffers)]
            self.read = [
                (vars(module).get, ATTRIBUTES[kind]) for module in self.modules if (kind := _kind(module)) in ATTRIBUTES
            ]
            self.state, self.answer = self._state(), _covered(self.modules)
        return self.answer

    def _is_unchanged(self) -> bool:
        try:
            return self._state() == self.state
        except RuntimeError:  # tensors do not compare to a bool
            return False

    def _state(self) -> tuple:
        """All that the answer depends on, in few calls because every forward pass compares it."""
        return (
            any(self.hooks) or _has_any_global_hook(),
            list(map(type, self.modules)),
            list(map(len, self.attributes)),  # a patched method is one more
            _flat(self.children),
            [tensor if tensor is None else tensor.shape for tensor in _flat(self.tensors)],
            [list(map(get, names)) for get, names in self.read],
            [getattr(kind, name) for kind, name in METHODS],
        )


def _flat(mappings: list[dict]) -> list:
    return list(itertools.chain.from_iterable(map(dict.values, mappings)))


def _kind(module: nn.Module) -> type[nn.Module]:
    """The type; torch's SyncBatchNorm for any BatchNorm whose class has a `process_group`, as the engine's on a CPU."""
    kind = type(module)
    return nn.SyncBatchNorm if issubclass(kind, _BatchNorm) and hasattr(kind, "process_group") else kind


def _covered(modules: list[nn.Module]) -> Covered:
    stages = modules[0]
    if [getattr(kind, name) for kind, name in METHODS] != UNPATCHED or not all(map(_is_plain, modules)):
        return Covered(None)
    functions = {module.function for module in modules if type(module) is LIF}
    trains = {module.training for module in modules if isinstance(module, _BatchNorm)}
    known = (
        not _has_any_global_hook()
        and type(stages) is nn.ModuleList
        and all(_has(stage, {"embed": (SPEDS,), "blocks": (nn.Sequential,)}) for stage in stages)
        and all(_holds(stage.blocks, Block) for stage in stages)
        and all(_is_known(module) for module in modules)
    )
    return Covered(functions.pop(), trains.pop()) if known and len(functions) == len(trains) == 1 else Covered(None)


def _is_plain(module: nn.Module) -> bool:
    """Whether the attributes that the answer depends on have the types that this project gives them."""
    kind, attributes = _kind(module), vars(module)
    if kind in CONVS and not all(isinstance(attributes[name], tuple) for name in WINDOW):
        return False
    return all(isinstance(attributes.get(name), PLAIN) for name in ATTRIBUTES.get(kind, ()))


def _has(module: nn.Module, children: dict[str, tuple[type, ...]]) -> bool:
    """Whether the children of a module are these and no others, apart from absent ones."""
    own = {name: _kind(child) for name, child in module._modules.items() if child is not None}
    return own.keys() == children.keys() and all(own[name] in kinds for name, kinds in children.items())


def _holds(module: nn.Module, kind: type[nn.Module]) -> bool:
    return all(type(child) is kind for child in module._modules.values())


def _is_known(m: nn.Module) -> bool:
    """Whether the fused path computes what a module of the stages does, its children apart."""
    kind, attributes = _kind(m), vars(m)
    if any(attributes[name] for name in HOOKS) or any(hasattr(kind, name) for name in attributes):
        return False  # watched, or a method of the class is patched
    if kind in CONVS:
        padding = tuple(size // 2 for size in m.kernel_size)
        is_plain = m.padding == padding and m.padding_mode == "zeros" and m.groups == 1 and max(m.dilation) == 1
        return is_plain and (kind is nn.Conv2d or is_linear(m))  # tokens get no neighbours
    if kind in NORMS:
        tensors = [(m._parameters | m._buffers).get(name) for name in ("weight", "bias", "running_mean", "running_var")]
        sizes = {None if tensor is None else len(tensor) for tensor in tensors}
        return m.track_running_stats and sizes == {m.num_features}
    if kind is nn.MaxPool2d:
        window = (m.kernel_size, m.stride, m.padding, m.dilation)
        return window == (3, 2, 1, 1) and not m.ceil_mode and not m.return_indices
    if kind is SPEDS:
        shortcut = {"shortcut": (SpikingConv,)} if m.shortcut is not None else {}
        has_all = _has(m, CHILDREN[kind] | shortcut) and _holds(m.units, SpikingConv)
        return has_all and not any(child.leak_across_batch for child in m.modules() if isinstance(child, LIF))
    if kind is Block:
        return _has(m, {"attn": ATTENTIONS, "mlp": (SpikingMLP,), "drop_path": (DropPath,)})
    if kind in CHILDREN and not _has(m, CHILDREN[kind]):
        return False
    if kind is SpikingConv:
        return m.lif.threshold == THRESHOLD and m.bn.num_features == len(m.conv.weight)
    if kind in ATTENTIONS:
        parts = [m.q, m.k, m.v] if kind is SpikingSelfAttention else [m.q, m.k]
        widths = {len(part.conv.weight) for part in parts}
        return m.attn_lif.threshold == ATTN_THRESHOLD and len(widths) == 1 and all(map(_is_projection, parts))
    return kind in (*CHILDREN, LIF, DropPath, nn.Identity, nn.Sequential, nn.ModuleList)


def _is_projection(m: SpikingConv) -> bool:
    """Whether a unit is a 1x1 convolution of the tokens, whose neurons run over time alone."""
    return is_linear(m.conv) and isinstance(m.pool, nn.Identity) and not m.lif.leak_across_batch
