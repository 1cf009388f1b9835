"""Rival networks with one stage: Spikformer, Spikingformer and the Spike-Driven Transformer.

Shapes: T time steps, B batch, C channels, H height, W width, N = H*W tokens, h heads, d = C/h channels a head.
"""

from collections import OrderedDict

from timm.layers import trunc_normal_
from torch import Tensor, nn

from .attention import SSA_SCALE, SpikingSelfAttention
from .embed import SPEDS
from .layers import Chain, ConvBN, SpikingConv, SpikingMLP
from .neuron import LIF, TAU, set_neurons
from .qkformer import Block, HierarchicalSpikingTransformer


class SpikeDrivenAttention(SpikingSelfAttention):
    """Spike-driven self-attention (SDSA; Yao et al., NeurIPS 2023): the sum of k*v over the tokens masks q's channels.

    The arguments are those of `SpikingSelfAttention`. Heads do not enter, and nothing is scaled.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * self.attn_lif((k * v).sum(4, keepdim=True))  # [T,B,h,d,N] * [T,B,h,d,1]


class PatchSplitting(nn.Module):
    """Five 3x3 convolutions to tokens: the first four may pool, the last gives tokens their position.

    [T,B,C,H,W] -> [T,B,C',H/s,W/s] (rounded up), with s = 2 to the number of pools. Unlike SPEDS it pools spikes.

    Args:
        in_channels: channels of the input.
        width: channels of the result; the convolutions have width / 8, / 4, / 2, width and width.
        pools: "1" for each of the first four convolutions that pools, else "0".
        kind: "sps" adds the last spikes to those before (Spikformer), "sps_ms" adds currents to currents (Spike-Driven
            Transformer), "tokenizer" adds nothing and ends in currents (Spikingformer).
    """

    def __init__(self, in_channels: int, width: int, pools: str, kind: str):
        super().__init__()
        self.adds = kind != "tokenizer"
        fourth, last = {
            "sps": (SpikingConv, SpikingConv),
            "sps_ms": (ConvBN, ConvBN),
            "tokenizer": (SpikingConv, ConvBN),
        }[kind]
        kinds = [SpikingConv, SpikingConv, SpikingConv, fourth, last]
        channels = [in_channels, width // 8, width // 4, width // 2, width, width]
        self.units = nn.ModuleList(unit(*channels[i : i + 2], kernel_size=3) for i, unit in enumerate(kinds))
        self.pools = nn.ModuleList(
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if flag == "1" else nn.Identity() for flag in pools
        )
        self.lif = LIF() if kind == "sps_ms" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for unit, pool in zip(self.units[:-1], self.pools, strict=True):
            y = unit(x)
            x = pool(y.flatten(0, 1)).unflatten(0, y.shape[:2])  # [T,B,C',H',W']
        y = self.units[-1](self.lif(x))
        return x + y if self.adds else y


ATTENTIONS = {"self": SpikingSelfAttention, "sdsa": SpikeDrivenAttention}


class SpikingTransformer(HierarchicalSpikingTransformer):
    """One stage: patch splitting, some blocks, then a linear head. `models.registry` has the variants.

    Spikformer (Zhou et al., ICLR 2023), Spikingformer (Zhou et al., 2023) and the Spike-Driven Transformer (Yao et al.,
    NeurIPS 2023) are settings of it. Input, output and membranes are as in `HierarchicalSpikingTransformer`.

    Args:
        embed: "sps", "sps_ms" or "tokenizer", see `PatchSplitting`; or "speds" for QKFormer's ablation.
        width: channels of the tokens.
        depth: number of blocks.
        heads: attention heads.
        pools: see `PatchSplitting`.
        attention: "self" or "sdsa".
        residual: "sew" adds spikes; "ms" adds membrane currents.
        head_lif: average spikes over time, not what the last block returns.
        mlp_ratio: hidden channels of the MLP over channels.
        qkv_bias: bias of the convolutions to q, k and v, which the BatchNorm after them makes idle.
        ssa_scale: factor of the product in the self-attention.
        tau: membrane time constant of every neuron.
        in_channels: channels of the input.
        num_classes: outputs of the head.
        time_steps: T of a static image.
    """

    def __init__(
        self,
        *,
        embed: str,
        width: int,
        depth: int,
        heads: int,
        pools: str = "1111",
        attention: str = "self",
        residual: str = "sew",
        head_lif: bool = False,
        mlp_ratio: float = 4,
        qkv_bias: bool = False,
        ssa_scale: float = SSA_SCALE,
        tau: float = TAU,
        in_channels: int = 3,
        num_classes: int = 1000,
        time_steps: int = 4,
    ):
        nn.Module.__init__(self)
        if embed == "speds":
            sizes = [width // 8, width // 4, width // 2, width, width]
            first = SPEDS(in_channels, list(zip(sizes, [flag == "1" for flag in f"{pools}0"], strict=True)), branch=3)
        else:
            first = PatchSplitting(in_channels, width, pools, embed)
        blocks = [
            Block(
                ATTENTIONS[attention](width, heads, residual, qkv_bias, ssa_scale),
                SpikingMLP(width, int(width * mlp_ratio), residual),
            )
            for _ in range(depth)
        ]
        self.stages = nn.ModuleList([Chain(OrderedDict(embed=first, blocks=Chain(*blocks)))])
        self.lif = LIF() if head_lif else nn.Identity()
        self.head = nn.Linear(width, num_classes)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.in_channels, self.num_classes, self.time_steps = in_channels, num_classes, time_steps
        self.fast_path = None
        set_neurons(self, "lif", tau)
