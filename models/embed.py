"""Patch embedding with a deformed shortcut (SPEDS; paper, section 3.3).

Shapes: T time steps, B batch, C channels, H height, W width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from .layers import SpikingConv, residual_branch


class SPEDS(nn.Module):
    """Chain of 3x3 spiking convolutions, some pooled, with a 1x1 shortcut around the units after `branch`.

    [T,B,C,H,W] -> [T,B,C',H/s,W/s] (rounded up), s = 2 to the number of pooled units.

    Args:
        units: (channels, pool) of each 3x3 unit.
        branch: number of units before the shortcut starts; with 0 it starts at the input.
        shortcut: False is the paper's ablation "w/o SPEDS".
        residual: "sew" adds the spikes of both paths; "ms" adds their membrane currents.
    """

    def __init__(
        self,
        in_channels: int,
        units: Sequence[tuple[int, bool]],
        branch: int,
        shortcut: bool = True,
        residual: str = "sew",
    ):
        super().__init__()
        self.branch = branch
        pre_activation, last = residual_branch(residual)
        self.lif = nn.Identity() if branch else pre_activation  # the units before the branch end in spikes
        channels = [in_channels, *(channels for channels, _ in units)]
        kinds = [SpikingConv] * (len(units) - 1) + [last]
        self.units = nn.ModuleList(
            kind(channels[i], channels[i + 1], kernel_size=3, pool=pool)
            for i, (kind, (_, pool)) in enumerate(zip(kinds, units, strict=True))
        )
        stride = 2 ** sum(pool for _, pool in units[branch:])
        self.shortcut = last(channels[branch], channels[-1], stride=stride) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(x)
        for unit in self.units[: self.branch]:
            x = unit(x)
        y = x
        for unit in self.units[self.branch :]:
            y = unit(y)
        return y if self.shortcut is None else y + self.shortcut(x)
