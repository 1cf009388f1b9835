"""timm's contract for networks of stages: feature maps, head, checkpointing and parameter groups.

Shapes: T time steps, B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from timm.layers import get_device_dtype, register_notrace_module, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import Chain
from .neuron import LIF, TAU, continued, require, require_choice, set_neurons

ALIASES = {"in_channels": "in_chans", "drop_path": "drop_path_rate"}  # this project's names for timm's arguments
register_notrace_module(LIF)  # makes it a leaf in timm's graphs; other tools need leaf_modules=[LIF]


class StreamState(NamedTuple):
    """State of `Backbone.step` between two frames of a recording."""

    steps: int  # frames so far
    total: Tensor  # [B,C], sum of the head's inputs over the frames
    membranes: tuple[Tensor, ...]  # of every LIF, in module order


class Backbone(nn.Module):
    """Chain of stages with a linear head; subclasses build the stages.

    Images [B,C,H,W] are repeated `time_steps` times; event frames [B,T,C,H,W] have their own T. Logits
    [B,num_classes] are averaged over tokens and time. Membranes start at zero in every call.

    Args:
        stages: modules that map [T,B,C,H,W] to [T,B,C',H',W'].
        feature_info: num_chs, reduction and module of each stage, in timm's format.
        residual: "sew", or "ms" for stages that end in membrane currents.
        head_lif: put neurons between the mean over tokens and the mean over time.
        num_classes: outputs of the head; 0 removes the head.
        global_pool: "avg", or "" to return feature maps instead of logits.
        keep_time: return feature maps [T,B,C,H,W], not their mean over time [B,C,H,W].
        time_steps: T of a static image.
        drop_rate: dropout before the head.
        neuron: "lif", "if" (no leak) or "plif" (one learned tau per layer).
        tau: membrane time constant in time steps; the initial one with "plif".
    """

    fast_path: Callable[[nn.Module, Tensor], Iterator[Tensor] | None] | None = None  # `models.backends` sets it

    def __init__(
        self,
        stages: Sequence[nn.Module],
        feature_info: list[dict],
        residual: str,
        *,
        head_lif: bool,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        keep_time: bool = False,
        time_steps: int = 4,
        drop_rate: float = 0.0,
        neuron: str = "lif",
        tau: float = TAU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        require(time_steps > 0, f"time_steps={time_steps}: must be at least 1")
        require(in_chans > 0, f"in_chans={in_chans}: must be at least 1")
        self.residual, self.time_steps = residual, time_steps
        self.in_chans = self.in_channels = in_chans
        self.keep_time, self.drop_rate, self.feature_info = keep_time, drop_rate, feature_info
        self.num_features = self.head_hidden_size = feature_info[-1]["num_chs"]  # timm asks for both
        self.stages = nn.ModuleList(stages)
        self.lif = LIF() if head_lif else nn.Identity()
        set_neurons(self, neuron, tau)
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    def stage_outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the output [T,B,C,H,W] of each stage for [B,C,H,W] or [B,T,C,H,W]."""
        frames = time_first(x, self.time_steps, self.in_chans)
        if self.fast_path and isinstance(x, Tensor) and (outputs := self.fast_path(self, x)) is not None:
            yield from outputs
            return
        for stage in self.stages:
            frames = stage(frames)
            yield frames

    def _last_output(self, x: Tensor) -> Tensor:
        for output in self.stage_outputs(x):
            last = output  # frees the previous stage's output
        return last

    def _feature_map(self, x: Tensor) -> Tensor:
        return x if self.keep_time else x.mean(0)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map [B,C,H,W] or [B,T,C,H,W] to the last stage's [B,C,H,W], or [T,B,C,H,W] with `keep_time`."""
        return self._feature_map(self._last_output(x))

    def _mean_tokens(self, x: Tensor) -> Tensor:
        """Average [T,B,C,H,W] over the tokens to [T,B,C], and apply the head's neurons if it has any."""
        return self.lif(x.mean((3, 4)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits [B,num_classes], or with `pre_logits` to the head's input [B,C].

        Features are [T,B,C,H,W], or their mean over time [B,C,H,W] if the head has no neurons.
        """
        x = with_time(x, isinstance(self.lif, nn.Identity))
        if not self.global_pool:
            require(not self.num_classes, "global_pool='': gives no logits; use reset_classifier(classes, 'avg')")
            return self._feature_map(x)
        x = nn.functional.dropout(self._mean_tokens(x).mean(0), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, time_first: bool = False) -> Tensor:
        """Map images [B,C,H,W] or event frames [B,T,C,H,W] to logits [B,num_classes].

        **Frames [T,B,C,H,W], as spikingjelly orders them, need `time_first=True`: the shape cannot show it.**
        """
        return self.forward_head(self._last_output(batch_first(x, time_first)))

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, x: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Classify a recording frame by frame as it arrives: without hidden state, in evaluation mode.

        After T steps the logits equal those of `forward` on the T frames in float64. In float32 rounding can flip a
        spike, because the convolution of one frame sums in another order. Memory does not grow with T.

        Args:
            x: the next frame [B,C,H,W].
            state: the state from the previous step; None starts a recording.

        Returns:
            Logits [B,num_classes] for the frames so far, and the state for the next step.
        """
        require(not self.training, "step: BatchNorm needs all frames in training mode; call model.eval()")
        require(x.dim() == 4, f"step: frame of shape {tuple(x.shape)}; pass one frame [B,C,H,W]")
        batch = len(x) if state is None else len(state.total)
        require(len(x) == batch, f"step: {len(x)} frames, but a state of {batch} recordings; pass state=None to start")
        neurons = [module for module in self.modules() if isinstance(module, LIF)]
        membranes = {} if state is None else dict(zip(neurons, state.membranes, strict=True))
        with continued(membranes):
            y = self._mean_tokens(self._last_output(x[:, None]))[0]  # [B,C]
        steps, total = (0, 0.0) if state is None else state[:2]
        total = total + y.to(torch.promote_types(y.dtype, torch.float32))  # a half-precision sum would stop growing
        logits = self.head((total / (steps + 1)).to(y.dtype))
        return logits, StreamState(steps + 1, total, tuple(membranes[neuron] for neuron in neurons))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last stage's features and a list with those of `indices`; see timm.

        `norm` has no effect, because no norm follows the stages.
        """
        require_choice("output_fmt", output_fmt, ("NCHW",))
        take, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i, output in enumerate(self.stage_outputs(x)):
            if i in take:
                maps.append(self._feature_map(output))
            if stop_early and i == last:
                break
        return maps if intermediates_only else (self._feature_map(output), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and the head; return the absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        is_cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return take

    @property
    def _model_args(self) -> dict[str, object]:
        """Arguments that timm saves with the weights: without aliases and this machine's backend."""
        return self._saved_args

    @_model_args.setter
    def _model_args(self, args: dict[str, object]) -> None:
        self._saved_args = {name: value for name, value in args.items() if name not in ("lif_backend", *ALIASES)}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes remove it. `global_pool` is "avg", "" for no pooling, or None to keep it."""
        require(num_classes >= 0, f"num_classes={num_classes}: must be at least 0")
        require_choice("global_pool", global_pool, (None, "avg", ""))
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self))
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each SPEDS and block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Chain):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns of parameter names for timm's layer decay; a later SPEDS joins the block after it."""
        by_block = [(r"^stages\.(\d+)\.embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stages\.0\.embed", "blocks": r"^stages\.(\d+)" if coarse else by_block}


@torch.fx.wrap  # one node in a graph of torch.fx
def batch_first(x: Tensor, is_time_first: bool) -> Tensor:
    """Return images [B,C,H,W] unchanged, and frames as [B,T,C,H,W]."""
    return x.transpose(0, 1) if is_time_first and x.dim() == 5 else x


@torch.fx.wrap
def time_first(x: Tensor, time_steps: int, in_chans: int) -> Tensor:
    """Return [T,B,C,H,W]: images [B,C,H,W] repeated, or event frames [B,T,C,H,W]."""
    if not x.is_floating_point():
        raise TypeError(f"input of {x.dtype}: not floating point; use x.float(), and normalize images")
    if x.dim() not in (4, 5) or x.shape[-3] != in_chans:
        raise ValueError(
            f"input of shape {tuple(x.shape)}: expected images [B,{in_chans},H,W] or event frames [B,T,{in_chans},H,W]"
        )
    if x.dim() == 5 and x.shape[1] == 0:
        raise ValueError(f"input of shape {tuple(x.shape)}: T is 0; pass at least one frame")
    return x.expand(time_steps, *x.shape) if x.dim() == 4 else x.transpose(0, 1)


@torch.fx.wrap
def with_time(x: Tensor, takes_mean: bool) -> Tensor:
    """Return features as [T,B,C,H,W]; T is 1 if they are a mean over time."""
    if x.dim() == 5:
        return x
    if not takes_mean:
        raise ValueError("features without time: the head's neurons need [T,B,C,H,W]; build with keep_time=True")
    return x[None]
