"""Rival networks with one stage: Spikformer, Spikingformer and the Spike-Driven Transformer.

Shapes: T time steps, B batch, C channels, H height, W width, N = H*W tokens, h heads, d = C/h channels a head.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .attention import SSA_SCALE, SpikingSelfAttention
from .backbone import Backbone
from .embed import SPEDS
from .layers import Chain, ConvBN, SpikingConv, SpikingMLP
from .neuron import LIF, require, require_choice
from .qkformer import Block


class SpikeDrivenAttention(SpikingSelfAttention):
    """Spike-driven self-attention (SDSA; Yao et al., NeurIPS 2023): the sum of k*v over the tokens masks q's channels.

    `heads` and `scale` have no effect; see `SpikingSelfAttention`.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * self.attn_lif((k * v).sum(4, keepdim=True))  # [T,B,h,d,N] * [T,B,h,d,1]


class PatchSplitting(nn.Module):
    """Five 3x3 convolutions from images to tokens: the first four may pool, the last encodes the position.

    [T,B,C,H,W] -> [T,B,C',H/s,W/s] (rounded up), s = 2 to the number of pools. Unlike SPEDS it pools spikes.

    Args:
        units: (channels, pool) of each convolution; the last does not pool.
        kind: "sps" adds the last spikes to those before (Spikformer); "sps_ms" adds currents (Spike-Driven
            Transformer); "tokenizer" ends in currents and adds nothing (Spikingformer).
    """

    def __init__(self, in_channels: int, units: list[tuple[int, bool]], kind: str):
        super().__init__()
        fourth = ConvBN if kind == "sps_ms" else SpikingConv
        fifth = SpikingConv if kind == "sps" else ConvBN
        channels = [in_channels, *(width for width, _ in units)]
        self.units = nn.ModuleList(
            unit(*channels[i : i + 2], kernel_size=3)
            for i, unit in enumerate([SpikingConv, SpikingConv, SpikingConv, fourth, fifth])
        )
        self.pools = nn.ModuleList(
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if pool else nn.Identity() for _, pool in units[:-1]
        )
        self.lif = LIF() if kind == "sps_ms" else nn.Identity()
        self.has_shortcut = kind != "tokenizer"

    def forward(self, x: Tensor) -> Tensor:
        for unit, pool in zip(self.units[:-1], self.pools, strict=True):
            y = unit(x)
            x = pool(y.flatten(0, 1)).unflatten(0, y.shape[:2])  # [T,B,C',H',W']
        y = self.units[-1](self.lif(x))
        return x + y if self.has_shortcut else y


ATTENTIONS = {"self": SpikingSelfAttention, "sdsa": SpikeDrivenAttention}
FAMILIES = {  # kind of `PatchSplitting`, attention, residual, head_lif (see `Backbone`)
    "spikformer": ("sps", "self", "sew", False),  # Zhou et al., ICLR 2023
    "spikingformer": ("tokenizer", "self", "ms", False),  # Zhou et al., 2023
    "sdt": ("sps_ms", "sdsa", "ms", True),  # Spike-Driven Transformer, Yao et al., NeurIPS 2023
}
_CIFAR, _DVS = {"pools": "0011"}, {"depth": 2, "heads": 16, "time_steps": 16}
RIVALS = {  # arguments of `SpikingTransformer`
    **{
        f"{family}_8_{width}": {"family": family, "width": width, "depth": 8, "heads": 8}
        for family in FAMILIES
        for width in (384, 512, 768)
    },
    "spikformer_4_384": {"family": "spikformer", "width": 384, "depth": 4, "heads": 12, "qkv_bias": True} | _CIFAR,
    "spikformer_4_256": {"family": "spikformer", "width": 256, "depth": 4, "heads": 8},
    "spikformer_3_64": {"family": "spikformer", "width": 64, "depth": 3, "heads": 8, "qkv_bias": True} | _CIFAR,
    "spikformer_2_256": {"family": "spikformer", "width": 256, "ssa_scale": 0.25} | _DVS,
    "spikformer_2_64": {"family": "spikformer", "width": 64, "ssa_scale": 0.25} | _DVS,
    "spikingformer_4_384": {"family": "spikingformer", "width": 384, "depth": 4, "heads": 12} | _CIFAR,
    "spikingformer_2_256": {"family": "spikingformer", "width": 256, "tau": 1.5} | _DVS,
    "sdt_2_256": {"family": "sdt", "width": 256, "pools": "0111"} | _DVS | {"heads": 8},
    "sdt_2_512": {"family": "sdt", "width": 512, "depth": 2, "heads": 8} | _CIFAR,
}


class SpikingTransformer(Backbone):
    """Network of one stage: five convolutions to tokens, some blocks, then a linear head.

    Args:
        family: a key of `FAMILIES`.
        width: channels of the tokens; the convolutions have width / 8, / 4, / 2, width and width.
        depth: number of blocks.
        pools: "1" for each of the first four convolutions that pools, else "0".
        embed: "speds" is the paper's ablation of Spikformer with SPEDS; None is the family's own.
        qkv_bias: bias of the q, k and v convolutions; the BatchNorm after them cancels it.
        **kwargs: input, time, head and neurons; see `Backbone`. For the others see `HierarchicalSpikingTransformer`.
    """

    def __init__(
        self,
        *,
        family: str,
        width: int,
        depth: int,
        heads: int,
        pools: str = "1111",
        embed: str | None = None,
        mlp_ratio: float = 4,
        qkv_bias: bool = False,
        ssa_scale: float = SSA_SCALE,
        in_chans: int = 3,
        **kwargs,
    ):
        require(heads > 0 and width % heads == 0, f"heads={heads}: must divide the {width} channels")
        require_choice("embed", embed, (None, "speds") if family == "spikformer" else (None,))
        require(len(pools) == 4 and set(pools) <= set("01"), f"pools={pools!r}: must be four digits, each 0 or 1")
        kind, attention, residual, head_lif = FAMILIES[family]
        widths = (width // 8, width // 4, width // 2, width, width)
        units = [(channels, flag == "1") for channels, flag in zip(widths, f"{pools}0", strict=True)]
        first = SPEDS(in_chans, units, branch=3) if embed else PatchSplitting(in_chans, units, kind)
        blocks = [
            Block(
                ATTENTIONS[attention](width, heads, residual, ssa_scale, qkv_bias=qkv_bias),
                SpikingMLP(width, int(width * mlp_ratio), residual),
            )
            for _ in range(depth)
        ]
        stage = Chain(OrderedDict(embed=first, blocks=Chain(*blocks)))
        info = [{"num_chs": width, "reduction": 2 ** pools.count("1"), "module": "stages.0"}]
        super().__init__([stage], info, residual, head_lif=head_lif, in_chans=in_chans, **kwargs)
        self.family, self.attention, self.pools = family, (attention,), pools
