"""Reference network: the hierarchical spiking transformer. `models.registry` has the variants.

Shapes: T time steps, B batch, C channels, H height, W width.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from .attention import SSA_SCALE, ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from .backbone import Backbone
from .embed import SPEDS, SPS
from .layers import Chain, DropPath, SpikingMLP
from .neuron import LIF, continued

ATTENTIONS = {"token": TokenQKAttention, "channel": ChannelQKAttention, "self": SpikingSelfAttention}

# family: (units of the first SPEDS, units before its shortcut starts, units of the later SPEDS), where a unit is
# (n, pool): a 3x3 convolution to 1/n of the stage's channels, pooled or not. Spikformer's have one stage.
FAMILIES = {
    "imagenet": ([(2, True), (1, True), (1, False)], 1, [(1, True), (1, False)]),
    "cifar": ([(2, False), (1, False)], 1, [(1, False), (1, True)]),
    "dvs": ([(8, False), (4, True), (2, True), (1, True)], 2, [(1, False), (1, True)]),
    "spikformer_cifar": ([(8, False), (4, False), (2, True), (1, True), (1, False)], 3, []),
    "spikformer_dvs": ([(8, True), (4, True), (2, True), (1, True), (1, False)], 3, []),
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


class StreamState(NamedTuple):
    """State of `HierarchicalSpikingTransformer.step` between two frames."""

    steps: int  # frames so far
    total: Tensor  # [B,C], sum over the frames of what the head reads
    membranes: tuple[Tensor, ...]  # of every LIF, in the order of the modules


class HierarchicalSpikingTransformer(Backbone):
    """QKFormer (Zhou et al., NeurIPS 2024): stages of one SPEDS and some blocks, then a linear head.

    Images [B,C,H,W] are repeated `time_steps` times; event frames [B,T,C,H,W] bring their own T. The result is
    [B,num_classes], averaged over tokens and time. Every membrane starts at zero and none outlives the call.

    Args:
        family: which SPEDS, a key of `FAMILIES`.
        width: channels of the last stage; each earlier stage has half of the next one's.
        depths: blocks of each stage.
        heads: attention heads, the same in all stages.
        mlp_ratio: hidden channels of the MLP over channels.
        attention: "token", "channel" or "self" for each stage.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 leaves it out.
        global_pool: "avg", or "" for feature maps in place of logits.
        keep_time: feature maps are [T,B,C,H,W] instead of their mean over time [B,C,H,W].
        time_steps: T of a static image.
        shortcut: SPEDS with its shortcut; False is the paper's ablation "w/o SPEDS".
        embed: "speds", or "sps" for the patch splitting of Spikformer, in Spikformer's families alone.
        residual: "sew" adds spikes (the paper); "ms" adds membrane currents (MaxFormer's MS-QKFormer).
        qkv_bias: bias of the convolutions to q, k and v, which the BatchNorm after them makes idle; Spikformer has it.
        ssa_scale: factor of the product in the self-attention; 1 is the paper's ablation "w/o scaling".
        ssa_membrane: "per_sample", or "released" to reproduce the leak across the batch in the released
            self-attention, on which the published accuracies and checkpoints depend (README, errata).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, the rate of the last block; it rises linearly from 0 in the first.

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
        num_classes: int = 1000,
        global_pool: str = "avg",
        keep_time: bool = False,
        time_steps: int = 4,
        embed: str = "speds",
        shortcut: bool = True,
        residual: str = "sew",
        qkv_bias: bool = False,
        ssa_scale: float = SSA_SCALE,
        ssa_membrane: str = "per_sample",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _require_kinds(family, embed, residual, ssa_membrane)
        _require_attention(attention, len(depths))
        dims = [width // 2 ** (len(depths) - 1 - i) for i in range(len(depths))]
        _require_sizes(dims[0], heads, mlp_ratio, time_steps=time_steps, in_chans=in_chans)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} must be at least 0 and below 1")
        self.family, self.attention, self.residual = family, tuple(attention), residual
        self.embed, self.shortcut, self.ssa_membrane, self.time_steps = embed, shortcut, ssa_membrane, time_steps
        self.in_chans = self.in_channels = in_chans
        self.keep_time, self.drop_rate = keep_time, drop_rate
        self.num_features = self.head_hidden_size = width
        self.spike_packing = False

        first_units, first_branch, later_units = FAMILIES[family]
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        attn = {"qkv_bias": qkv_bias}
        self_attn = attn | {"scale": ssa_scale, "leak_across_batch": ssa_membrane == "released"}
        self.stages = nn.ModuleList()
        self.feature_info, reduction = [], 1
        for i, (dim, depth, kind) in enumerate(zip(dims, depths, attention, strict=True)):
            units = [(dim // n, pool) for n, pool in (later_units if i else first_units)]
            channels, branch = (dims[i - 1], 0) if i else (in_chans, first_branch)
            first = (
                SPS(channels, units, shortcut) if embed == "sps" else SPEDS(channels, units, branch, shortcut, residual)
            )
            options = self_attn if kind == "self" else attn
            blocks = [
                Block(
                    ATTENTIONS[kind](dim, heads, residual, **options),
                    SpikingMLP(dim, int(dim * mlp_ratio), residual),
                    next(rates),
                )
                for _ in range(depth)
            ]
            self.stages.append(Chain(OrderedDict(embed=first, blocks=Chain(*blocks))))
            reduction *= 2 ** sum(pool for _, pool in units)
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.lif = LIF() if residual == "ms" else nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, x: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Classify a recording that is still arriving, frame by frame: a pure function, in evaluation mode.

        After T steps the logits are those of `forward` on the T frames together, to the last bit where that is computed
        by the modules (lif_backend "torch"); memory does not grow with T.

        Args:
            x: the next frame [B,C,H,W].
            state: the state that the previous step returned; None starts a recording.

        Returns:
            Logits [B,num_classes] for the frames so far, and the state for the next step.

        Raises:
            ValueError: the network is in training mode, or the frames are of another number of recordings.
        """
        if self.training:
            raise ValueError("step needs evaluation mode, call model.eval(): in training BatchNorm needs all frames")
        if state is not None and len(state.total) != len(x):
            raise ValueError(f"frames of {len(x)} recordings cannot continue a state of {len(state.total)}")
        neurons = [module for module in self.modules() if isinstance(module, LIF)]
        membranes = {} if state is None else dict(zip(neurons, state.membranes, strict=True))
        with continued(membranes):
            y = self.mean_tokens(self._last_output(x[:, None]))[0]  # [B,C]
        total = y.to(torch.promote_types(y.dtype, torch.float32))  # a sum in half precision stops growing
        steps = 1
        if state is not None:
            total, steps = state.total + total, state.steps + 1
        logits = self.head((total / steps).to(y.dtype))
        return logits, StreamState(steps, total, tuple(membranes[neuron] for neuron in neurons))

    def set_spike_packing(self, enable: bool = True) -> None:
        """Keep spikes for the backward pass as bits and bytes on the fused path: less memory for a little more time.

        Raises:
            ValueError: the network has stochastic depth, which scales spikes.
        """
        if enable and any(isinstance(module, DropPath) and module.rate for module in self.modules()):
            raise ValueError("packed spikes need drop_path=0: stochastic depth scales them, and they are whole numbers")
        self.spike_packing = enable


def _require_kinds(family: str, embed: str, residual: str, ssa_membrane: str) -> None:
    _require_choice("family", family, FAMILIES)
    _require_choice("embed", embed, ("speds", "sps"))
    _require_choice("residual", residual, ("sew", "ms"))
    _require_choice("ssa_membrane", ssa_membrane, ("per_sample", "released"))
    if residual == "ms" and ssa_membrane == "released":
        raise ValueError("ssa_membrane='released' needs residual='sew': with 'ms' no membrane leaks")
    if embed == "sps" and (residual == "ms" or not family.startswith("spikformer")):
        raise ValueError("embed='sps' is Spikformer's: it needs one of its models, and residual='sew'")


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")


def _require_attention(attention: Sequence[str], stages: int) -> None:
    if isinstance(attention, str) or len(attention) != stages:
        raise ValueError(f"attention={attention!r} must name one of {', '.join(ATTENTIONS)} per stage ({stages})")
    for kind in attention:
        _require_choice("attention", kind, ATTENTIONS)


def _require_sizes(narrowest: int, heads: int, mlp_ratio: float, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if heads < 1 or narrowest % heads:
        raise ValueError(f"heads={heads} must divide the {narrowest} channels of the first stage")
    if int(narrowest * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP without hidden channels")
