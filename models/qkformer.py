"""Hierarchical spiking transformer, the reference network; `models.registry` has its variants.

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
from .neuron import require, require_choice

ATTENTIONS = {
    "token": TokenQKAttention,
    "channel": ChannelQKAttention,
    "self": SpikingSelfAttention,
}

# family: (units of the first SPEDS, units before its shortcut starts, units of the later SPEDS); a unit (n, pool) is
# a 3x3 convolution to 1/n of the stage's channels, with max pooling if `pool`.
FAMILIES = {
    "imagenet": ([(2, True), (1, True), (1, False)], 1, [(1, True), (1, False)]),
    "cifar": ([(2, False), (1, False)], 1, [(1, False), (1, True)]),
    "dvs": ([(8, False), (4, True), (2, True), (1, True)], 2, [(1, False), (1, True)]),
}


class Block(nn.Module):
    """Attention and MLP, each with a residual; keeps [T,B,C,H,W]. With "sew" residuals x holds small integers."""

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
        family: kind of SPEDS, a key of `FAMILIES`.
        width: channels of the last stage; they double from stage to stage.
        depths: blocks of each stage.
        heads: attention heads of every stage.
        mlp_ratio: hidden channels of the MLP per channel.
        attention: "token", "channel" or "self" for each stage.
        shortcut: shortcut in SPEDS; False is the paper's ablation "w/o SPEDS".
        residual: "sew" adds spikes (the paper); "ms" adds membrane currents (MaxFormer's MS-QKFormer).
        ssa_scale: scale of the self-attention; 1 is the paper's ablation "w/o scaling".
        ssa_membrane: "per_sample", or "released" for the leak across the batch in the released self-attention.
            Published accuracies and checkpoints depend on it (docs/errata.md).
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 in the first.
        **kwargs: input, time, head and neurons; see `Backbone`.
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
        require_choice("family", family, FAMILIES)
        require_choice("residual", residual, ("sew", "ms"))
        require_choice("ssa_membrane", ssa_membrane, ("per_sample", "released"))
        leaks = ssa_membrane == "released"
        require(
            residual == "sew" or not leaks, "ssa_membrane='released': needs residual='sew'; no membrane leaks in 'ms'"
        )
        is_per_stage = not isinstance(attention, str) and len(attention) == len(depths)
        require(
            is_per_stage, f"attention={attention!r}: pass one of {', '.join(ATTENTIONS)} for each stage ({len(depths)})"
        )
        for kind in attention:
            require_choice("attention", kind, ATTENTIONS)
        dims = [width // 2 ** (len(depths) - 1 - i) for i in range(len(depths))]
        require(
            heads > 0 and dims[0] % heads == 0, f"heads={heads}: must divide the {dims[0]} channels of the first stage"
        )
        require(int(dims[0] * mlp_ratio) > 0, f"mlp_ratio={mlp_ratio}: leaves the MLP without hidden channels")
        require(0 <= drop_path_rate < 1, f"drop_path_rate={drop_path_rate}: must be at least 0 and below 1")
        first_units, first_branch, later_units = FAMILIES[family]
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self_attn = {"scale": ssa_scale, "leak_across_batch": leaks}
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
        self.family, self.attention, self.ssa_membrane = family, tuple(attention), ssa_membrane
        sizes = {"family": family, "width": width, "depths": tuple(depths), "heads": heads, "mlp_ratio": mlp_ratio}
        kinds = {"attention": self.attention, "shortcut": shortcut, "ssa_membrane": ssa_membrane}
        self.arguments = sizes | kinds | {"in_chans": in_chans}  # to build the same stages again
        self.spike_packing = False

    def set_spike_packing(self, enable: bool = True) -> None:
        """Keep spikes for the backward pass as bits and bytes on the fused path: less memory, a little more time."""
        drops = any(isinstance(module, DropPath) and module.rate for module in self.modules())
        require(not (enable and drops), "packed spikes: stochastic depth scales spikes; use drop_path=0")
        self.spike_packing = enable
