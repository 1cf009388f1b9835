"""Reference network: the hierarchical spiking transformer. `models.registry` has the variants.

Shapes: T time steps, B batch, C channels, H height, W width.
"""

from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from .attention import SSA_SCALE, ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from .backbone import Backbone
from .embed import SPEDS
from .layers import Chain, DropPath, SpikingMLP

ATTENTIONS = {"token": TokenQKAttention, "channel": ChannelQKAttention, "self": SpikingSelfAttention}

# family: (units of the first SPEDS, units before its shortcut starts, units of the later SPEDS), where a unit is
# (n, pool): a 3x3 convolution to 1/n of the stage's channels, pooled or not.
FAMILIES = {
    "imagenet": ([(2, True), (1, True), (1, False)], 1, [(1, True), (1, False)]),
    "cifar": ([(2, False), (1, False)], 1, [(1, False), (1, True)]),
    "dvs": ([(8, False), (4, True), (2, True), (1, True)], 2, [(1, False), (1, True)]),
}


class Block(nn.Module):
    """x + attention(x), then x + mlp(x). [T,B,C,H,W], unchanged. With "sew" residuals x is a small integer."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class HierarchicalSpikingTransformer(Backbone):
    """QKFormer (Zhou et al., NeurIPS 2024): stages of one SPEDS and some blocks, then a linear head.

    Args:
        family: which SPEDS, a key of `FAMILIES`.
        width: channels of the last stage; each earlier stage has half of the next one's.
        depths: blocks of each stage.
        heads: attention heads, the same in all stages.
        mlp_ratio: hidden channels of the MLP over channels.
        attention: "token", "channel" or "self" for each stage.
        shortcut: SPEDS with its shortcut; False is the paper's ablation "w/o SPEDS".
        residual: "sew" adds spikes (the paper); "ms" adds membrane currents (MaxFormer's MS-QKFormer).
        ssa_scale: factor of the product in the self-attention; 1 is the paper's ablation "w/o scaling".
        ssa_membrane: "per_sample", or "released" to reproduce the leak across the batch in the released
            self-attention, on which the published accuracies and checkpoints depend (docs/errata.md).
        drop_path_rate: stochastic depth, the rate of the last block; it rises linearly from 0 in the first.
        **kwargs: see `Backbone`, for input, time, head and neurons.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        *,
        family: str,
        width: int,
        depths: Sequence[int],
        heads: int,
        mlp_ratio: float = 4,
        attention: Sequence[str] = ("token", "token", "self"),
        in_chans: int = 3,
        shortcut: bool = True,
        residual: str = "sew",
        ssa_scale: float = SSA_SCALE,
        ssa_membrane: str = "per_sample",
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        _require_kinds(family, residual, ssa_membrane)
        _require_attention(attention, len(depths))
        dims = [width // 2 ** (len(depths) - 1 - i) for i in range(len(depths))]
        _require_sizes(dims[0], heads, mlp_ratio)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} must be at least 0 and below 1")
        first_units, first_branch, later_units = FAMILIES[family]
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self_attn = {"scale": ssa_scale, "leak_across_batch": ssa_membrane == "released"}
        stages, feature_info, reduction = [], [], 1
        for i, (dim, depth, kind) in enumerate(zip(dims, depths, attention, strict=True)):
            units = [(dim // n, pool) for n, pool in (later_units if i else first_units)]
            channels, branch = (dims[i - 1], 0) if i else (in_chans, first_branch)
            embed = SPEDS(channels, units, branch, shortcut, residual)
            blocks = [
                Block(
                    ATTENTIONS[kind](dim, heads, residual, **(self_attn if kind == "self" else {})),
                    SpikingMLP(dim, int(dim * mlp_ratio), residual),
                    next(rates),
                )
                for _ in range(depth)
            ]
            stages.append(Chain(OrderedDict(embed=embed, blocks=Chain(*blocks))))
            reduction *= 2 ** sum(pool for _, pool in units)
            feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        super().__init__(stages, feature_info, residual, head_lif=residual == "ms", in_chans=in_chans, **kwargs)
        self.family, self.attention = family, tuple(attention)
        self.shortcut, self.ssa_membrane = shortcut, ssa_membrane
        self.spike_packing = False

    def set_spike_packing(self, enable: bool = True) -> None:
        """Keep spikes for the backward pass as bits and bytes on the fused path: less memory for a little more time.

        Raises:
            ValueError: the network has stochastic depth, which scales spikes.
        """
        if enable and any(isinstance(module, DropPath) and module.rate for module in self.modules()):
            raise ValueError("packed spikes need drop_path=0: stochastic depth scales them, and they are whole numbers")
        self.spike_packing = enable


def _require_kinds(family: str, residual: str, ssa_membrane: str) -> None:
    _require_choice("family", family, FAMILIES)
    _require_choice("residual", residual, ("sew", "ms"))
    _require_choice("ssa_membrane", ssa_membrane, ("per_sample", "released"))
    if residual == "ms" and ssa_membrane == "released":
        raise ValueError("ssa_membrane='released' needs residual='sew': with 'ms' no membrane leaks")


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")


def _require_attention(attention: Sequence[str], stages: int) -> None:
    if isinstance(attention, str) or len(attention) != stages:
        raise ValueError(f"attention={attention!r} must name one of {', '.join(ATTENTIONS)} per stage ({stages})")
    for kind in attention:
        _require_choice("attention", kind, ATTENTIONS)


def _require_sizes(narrowest: int, heads: int, mlp_ratio: float) -> None:
    if heads < 1 or narrowest % heads:
        raise ValueError(f"heads={heads} must divide the {narrowest} channels of the first stage")
    if int(narrowest * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP without hidden channels")
