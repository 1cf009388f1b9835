"""Safety of the fused path: it replaces modules only as this project builds them, unwatched and unchanged."""

from collections.abc import Callable
from operator import itemgetter
from types import FunctionType
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from ..attention import ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from ..embed import SPEDS
from ..layers import Chain, DropPath, SpikingConv, SpikingMLP
from ..neuron import ATTN_THRESHOLD, LIF, TAU, THRESHOLD
from ..qkformer import Block
from .plan import is_linear

CONVS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
ATTENTIONS = (TokenQKAttention, ChannelQKAttention, SpikingSelfAttention)
QK = {"lif": (nn.Identity,), "q": (SpikingConv,), "k": (SpikingConv,), "attn_lif": (LIF,), "proj": (SpikingConv,)}
CHILDREN = {  # kind -> children and their kinds
    Block: {"attn": ATTENTIONS, "mlp": (SpikingMLP,), "drop_path": (DropPath,)},
    SPEDS: {"lif": (nn.Identity,), "units": (nn.ModuleList,)},  # and perhaps a shortcut
    SpikingConv: {"conv": CONVS, "bn": NORMS, "pool": (nn.Identity, nn.MaxPool2d), "lif": (LIF,)},
    TokenQKAttention: QK,
    ChannelQKAttention: QK,
    SpikingSelfAttention: QK | {"v": (SpikingConv,)},
    SpikingMLP: {"lif": (nn.Identity,), "fc1": (SpikingConv,), "fc2": (SpikingConv,)},
}
LEAVES = (*CONVS, *NORMS, LIF, DropPath, nn.MaxPool2d, nn.Identity)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
WINDOW = ("kernel_size", "stride", "padding", "dilation")
NUMBERS = ("threshold", "tau", "momentum", "eps", "scale", "rate")
TYPES = dict.fromkeys(WINDOW, (int, tuple)) | dict.fromkeys(NUMBERS, (int, float)) | {"function": FunctionType}
NAMES = (
    "__call__",
    "_call_impl",
    "forward",
    "attend",
    "parts",
    "units",
    "_over_time",
    "charge",
    "_conv_forward",
    "_check_input_dim",
)
METHODS = [(kind, name) for kind in (*CHILDREN, *LEAVES, Chain) for name in NAMES if hasattr(kind, name)]


def _methods() -> list:
    return [getattr(kind, name) for kind, name in METHODS]


UNPATCHED = _methods()


class Covered(NamedTuple):
    """Answer of `Coverage`: if the fused path covers a network, and how the network is set."""

    function: Callable | None  # of all neurons; None: the modules compute
    trains: bool = False  # BatchNorm takes the statistics of the batch
    drops: bool = False  # stochastic depth scales spikes


class Coverage:
    """Memory of the answer for the stages of one network, until anything that it depends on changes."""

    def __init__(self):
        self._snapshot: _Snapshot | None = None

    def of(self, stages: nn.ModuleList) -> Covered:
        """Return the answer; every forward pass asks."""
        snapshot = self._snapshot
        if snapshot is None or not snapshot.holds(stages):
            snapshot = self._snapshot = _Snapshot(stages)  # in one step, because threads may share a network
        return snapshot.answer


class _Snapshot:
    """Answer, with everything that it depends on: attributes, children, hooks and parameters of every module."""

    def __init__(self, stages: nn.ModuleList):
        self.modules = list(stages.modules())
        attributes = list(map(vars, self.modules))
        inner = [each[name] for each in attributes for name in ("_modules", "_parameters", "_buffers") if each[name]]
        self.dicts = attributes + inner
        self.copies = list(map(dict, self.dicts))
        self.hooks = [each[name] for each in attributes for name in HOOKS]
        leaves = [m for m in self.modules if isinstance(m, (*CONVS, _BatchNorm))]
        tensors = [tensor for m in leaves for tensor in (m._parameters | m._buffers).values() if tensor is not None]
        self.tensors = [tensor for tensor in tensors if tensor.dim()]
        self.vectors = [tensor for tensor in tensors if tensor.dim() == 1]
        self.numbers = [(itemgetter(name), [each for each in attributes if name in each]) for name in NUMBERS]
        self.state = self._state()
        self.answer = _answer(self.modules)

    def holds(self, stages: nn.ModuleList) -> bool:
        """Return whether nothing has changed. Loops run in C: one in Python takes longer than a kernel."""
        try:
            return stages is self.modules[0] and self.dicts == self.copies and self._state() == self.state
        except Exception:  # of a comparison: tensors, say, give no bool
            return False

    def _state(self) -> tuple:
        """Collect the parts of the state that comparing dictionaries misses."""
        return (
            any(self.hooks) or bool(_has_any_global_hook()),
            list(map(type, self.modules)),
            [set(map(type, map(get, owners))) for get, owners in self.numbers],  # 1.0 equals a tensor of 1.0
            list(map(Tensor.numel, self.tensors)),  # `.data` may be another's
            all(map(Tensor.is_contiguous, self.vectors)),
            _methods(),
        )


def _answer(modules: list[nn.Module]) -> Covered:
    """Return the answer for modules in the order of `nn.Module.modules`, parents first."""
    stages, nothing = modules[0], Covered(None)
    if _has_any_global_hook() or _methods() != UNPATCHED or type(stages) is not nn.ModuleList:
        return nothing
    if not all(_has(stage, {"embed": (SPEDS,), "blocks": (Chain,)}) for stage in stages):
        return nothing
    if not all(type(stage) is Chain and _holds(stage.blocks, Block) for stage in stages):
        return nothing
    if not all(map(_is_plain, modules)) or not all(map(_is_known, reversed(modules))):
        return nothing
    functions = {module.function for module in modules if type(module) is LIF}
    trains = {module.training for module in modules if isinstance(module, _BatchNorm)}
    drops = any(module.rate for module in modules if type(module) is DropPath)
    return Covered(functions.pop(), trains.pop(), drops) if len(functions) == len(trains) == 1 else nothing


def _is_plain(m: nn.Module) -> bool:
    """Return whether nothing watches or patches a module, and its attributes and tensors are of plain types."""
    kind, attributes = type(m), vars(m)
    if any(attributes[name] for name in HOOKS) or any(hasattr(kind, name) for name in attributes):
        return False
    tensors = [*m._parameters.values(), *m._buffers.values()]
    if tensors and kind not in (*CONVS, *NORMS):
        return False
    return all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors) and all(
        isinstance(attributes[name], types) for name, types in TYPES.items() if name in attributes
    )


def _has(m: nn.Module, children: dict[str, tuple[type, ...]]) -> bool:
    """Return whether a module has exactly these children, apart from absent ones."""
    kinds = {name: type(child) for name, child in m._modules.items() if child is not None}
    return kinds.keys() == children.keys() and all(kinds[name] in children[name] for name in kinds)


def _holds(m: nn.Module, kind: type[nn.Module]) -> bool:
    return all(type(child) is kind for child in m._modules.values())


def _is_known(m: nn.Module) -> bool:
    """Return whether the fused path computes the answer of a module of plain types, its children apart."""
    kind = type(m)
    if kind in CONVS:
        if not all(type(getattr(m, name)) is tuple for name in WINDOW):
            return False
        is_odd = m.weight.shape[2:] == m.kernel_size and all(size % 2 for size in m.kernel_size)
        keeps_size = is_odd and m.padding == tuple(size // 2 for size in m.kernel_size) and max(m.dilation) == 1
        is_plain = keeps_size and m.padding_mode == "zeros" and m.groups == 1
        return is_plain and (kind is nn.Conv2d or is_linear(m))  # tokens get no neighbours
    if kind in NORMS:
        tensors = m._parameters | m._buffers
        vectors = [tensors.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
        counts = m.track_running_stats and tensors.get("num_batches_tracked") is not None
        return counts and all(_is_row(vector, m.num_features) for vector in vectors)
    if kind is nn.MaxPool2d:
        window = (m.kernel_size, m.stride, m.padding, m.dilation)
        return window == (3, 2, 1, 1) and not m.ceil_mode and not m.return_indices
    if kind is SPEDS:
        shortcut = {"shortcut": (SpikingConv,)} if m.shortcut is not None else {}
        return _has(m, CHILDREN[kind] | shortcut) and _holds(m.units, SpikingConv) and _sizes_agree(m)
    if kind in CHILDREN and not _has(m, CHILDREN[kind]):
        return False
    if kind is SpikingConv:
        width = m.bn.num_features
        has_width = len(m.conv.weight) == width and (m.conv.bias is None or _is_row(m.conv.bias, width))
        return has_width and m.lif.threshold == THRESHOLD
    if kind in ATTENTIONS:
        parts = m.units()
        widths = {len(part.conv.weight) for part in parts}
        divides = m.heads > 0 and not any(width % m.heads for width in widths)
        per_sample = not any(part.lif.leak_across_batch for part in parts)
        is_plain = divides and len(widths) == 1 and per_sample and all(map(_keeps_size, (*parts, m.proj)))
        return is_plain and m.attn_lif.threshold == ATTN_THRESHOLD
    if kind is LIF:
        return m.tau == TAU
    if kind is SpikingMLP:
        return _keeps_size(m.fc1) and _keeps_size(m.fc2)
    return kind in (*CHILDREN, *LEAVES, Chain, nn.ModuleList)


def _is_row(vector: Tensor | None, size: int) -> bool:
    """Return whether a kernel can read `size` numbers from the start of the vector."""
    return vector is not None and vector.shape == (size,) and vector.is_contiguous()


def _keeps_size(m: SpikingConv) -> bool:
    """Return whether a unit is a 1x1 convolution without pooling."""
    return is_linear(m.conv) and type(m.pool) is nn.Identity


def _sizes_agree(m: SPEDS) -> bool:
    """Return whether the paths of a SPEDS end at one size. No membrane may leak, because an image comes once."""
    stride = 2 ** sum(type(unit.pool) is nn.MaxPool2d for unit in m.units[m.branch :])
    agrees = m.shortcut is None or (m.shortcut.conv.stride, type(m.shortcut.pool)) == ((stride, stride), nn.Identity)
    leaks = any(child.leak_across_batch for child in m.modules() if type(child) is LIF)
    return agrees and not leaks and all(max(unit.conv.stride) == 1 for unit in m.units)
