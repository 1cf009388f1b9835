"""Report of an energy measurement: totals in each of the usual accounts, a table of the layers, and a figure."""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path

from .common import drawing, write_csv

MAC_PJ, AC_PJ = 4.6, 0.9
MJ = 1e-9  # of a picojoule
# accounts of an integer input, and of a static image's first convolution; the paper uses the first of each
INTEGERS = ("additions", "multiplications")
FIRST = ("every step", "once")


def energy_mj(first_macs: float, sops: float, time_steps: int) -> float:
    """Return the energy (mJ) of a spiking network from MACs a step of the first convolution and SOPs of the rest."""
    return (MAC_PJ * time_steps * first_macs + AC_PJ * sops) * MJ


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution, linear layer or matrix product."""

    name: str
    macs: float  # of one sample at one time step
    mean_input: float | None  # in a product that of the second factor; None on the meta device
    density: float | None  # share of the inputs that are not zero
    is_binary: bool  # all inputs are 0 or 1
    exact: tuple[float, ...] = ()  # synaptic operations of all time steps, an integer n counted as n and as 1
    is_head: bool = False  # computed once, from means over tokens and time

    def sops(self, time_steps: int) -> float:
        """Return the synaptic operations in `time_steps`; raise `ValueError` on the meta device."""
        if self.mean_input is None:
            raise ValueError(f"{self.name}: no inputs on the meta device; estimate the network on data")
        return self.mean_input * time_steps * self.macs


@dataclasses.dataclass(frozen=True)
class EnergyReport:
    """Operations and energy of a network for one sample, averaged over `samples`."""

    layers: list[Layer]  # in the order of execution
    time_steps: int  # T; 1 for a network without spiking neurons
    firing_rates: dict[str, float]  # mean output of each LIF, by its name
    samples: int
    has_frames: bool  # the input differs at each time step

    @property
    def flops(self) -> float:
        """Return the multiply-accumulates of one time step (the field's "FLOPs")."""
        return sum(layer.macs for layer in self.layers)

    @property
    def sops(self) -> float:
        """Return the synaptic operations of all time steps, without the first convolution."""
        return sum(layer.sops(self.time_steps) for layer in self.layers[1:])

    @property
    def energy_mj(self) -> float:
        """Return the energy (mJ) in the paper's account; 4.6 pJ a MAC for a network without spiking neurons."""
        return self.energy()

    @property
    def exact_sops(self) -> tuple[float, ...]:
        """Return the `sops` by each spike's fan-out, an integer n counted as n and as 1; the head runs once."""
        return tuple(map(sum, zip(*(layer.exact for layer in self.layers[1:]), strict=True)))

    def energy(self, integers: str = INTEGERS[0], first: str = FIRST[0]) -> float:
        """Return the energy (mJ) in one account: an integer as n additions or one multiplication, one of `FIRST`."""
        return sum(self.layer_energy(i, integers, first) for i in range(len(self.layers)))

    @property
    def accounts(self) -> list[dict]:
        """Return `energy` in every account."""
        pairs = itertools.product(INTEGERS, FIRST[: 1 if self.has_frames else 2])
        return [{"integers": i, "first_convolution": first, "energy_mj": self.energy(i, first)} for i, first in pairs]

    def layer_energy(self, index: int, integers: str = INTEGERS[0], first: str = FIRST[0]) -> float:
        """Return the energy (mJ) of layer `index`."""
        layer = self.layers[index]
        if index == 0 or not self.firing_rates:
            return MAC_PJ * layer.macs * (1 if first == "once" else self.time_steps) * MJ
        if integers == "multiplications" and not layer.is_binary:
            return MAC_PJ * layer.density * (1 if layer.is_head else self.time_steps) * layer.macs * MJ
        return AC_PJ * layer.sops(self.time_steps) * MJ

    def summary(self) -> dict:
        """Return the totals as plain data."""
        return {
            "energy_mj": self.energy_mj,
            "accounts": self.accounts,
            "macs_per_step": self.flops,
            "macs_of_first_convolution": self.layers[0].macs,
            "sops": self.sops,
            "exact_sops": dict(zip(("n", "1"), self.exact_sops, strict=True)),  # of an integer n
            "mean_input": self.sops / (self.time_steps * (self.flops - self.layers[0].macs)),
            "firing_rate": statistics.fmean(self.firing_rates.values()) if self.firing_rates else None,  # of all LIFs
            "time_steps": self.time_steps,
            "samples": self.samples,
        }

    def rows(self) -> list[dict]:
        """Return the table of the layers."""
        return [
            {
                "layer": layer.name,
                "MACs a step": layer.macs,
                "mean input": layer.mean_input,
                "share not 0": layer.density,
                "input": "real" if i == 0 or layer.is_head else "spikes" if layer.is_binary else "integers",
                "SOPs": layer.sops(self.time_steps) if i else 0.0,
                "exact SOPs": layer.exact[0] if i else 0.0,
                "energy (mJ)": self.layer_energy(i),
            }
            for i, layer in enumerate(self.layers)
        ]

    def totals(self) -> str:
        """Format the totals in a few lines."""
        lines = [
            f"energy {self.energy_mj:.4g} mJ a sample: {self.flops / 1e6:,.2f} M MACs a step, T = {self.time_steps}, "
            f"{self.sops / 1e6:,.2f} M synaptic operations (SOPs)"
        ]
        if self.firing_rates:
            form = "  integers as {integers}, first convolution {first_convolution}: {energy_mj:.4g} mJ"
            lines += [form.format(**account) for account in self.accounts]
            lines.append("  exact SOPs: {:,.0f}, or {:,.0f} with an integer counted as 1".format(*self.exact_sops))
        return "\n".join(lines)

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write `NAME.energy.json`, `.csv` (the layers) and `.png` to `folder`; return their paths."""
        paths = [folder / f"{name}.energy.{kind}" for kind in ("json", "csv", "png")]
        content = self.summary() | {"firing_rates": self.firing_rates, "layers": self.rows()}
        paths[0].write_text(json.dumps(content, indent=2) + "\n")
        write_csv(paths[1], self.rows())
        self.draw(paths[2])
        return paths

    def draw(self, path: Path) -> None:
        """Draw energy and mean input of each layer as bars."""
        rows, size = self.rows(), (max(7, 0.24 * len(self.layers)), 7)
        colours = {"real": "tab:red", "spikes": "tab:blue", "integers": "tab:orange"}
        with drawing(path, 2, 1, size, grid="y", sharex=True) as (_, (energy, inputs)):
            for kind, colour in colours.items():
                at = [i for i, row in enumerate(rows) if row["input"] == kind]
                energy.bar(at, [1000 * rows[i]["energy (mJ)"] for i in at], color=colour, label=f"input: {kind}")
                means = [rows[i]["mean input"] if i else 0 for i in at]  # the mean of the image has no meaning
                inputs.bar(at, means, color=colour)
            energy.set(ylabel="energy (µJ a sample)", title=self.totals().splitlines()[0])
            energy.legend()
            inputs.set(ylabel="mean input")
            inputs.set_xticks(range(len(rows)), [row["layer"] for row in rows], rotation=90, fontsize=7)
            inputs.margins(x=0.01)
