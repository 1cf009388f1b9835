"""Energy of one inference as the field's tables count it ("Power (mJ)"), from multiply-accumulates and mean inputs.

E = 4.6 pJ * T * MACs(first convolution) + 0.9 pJ * SOPs, where the synaptic operations SOPs are the sum over all other
layers of mean(input) * T * MACs (QKFormer, section 4; the energies of a 32-bit multiply-accumulate and of an addition
in 45 nm are Horowitz's, ISSCC 2014). MACs are those of one sample at one time step, which the field calls FLOPs. Matrix
products of the attention are layers too; BatchNorm, pooling and the neurons are not counted.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models import LIF

from .common import write_csv

MAC_PJ, AC_PJ = 4.6, 0.9
MJ = 1e-9  # of a picojoule
# how a mean integer is counted, and how often the first convolution of a static image: the first of each is the paper's
INTEGERS = ("additions", "multiplications")
FIRST = ("every step", "once")


def energy_mj(first_macs: float, sops: float, time_steps: int) -> float:
    """Energy (mJ) of a spiking network: MACs of its first convolution in each step, and SOPs of all the rest."""
    return (MAC_PJ * time_steps * first_macs + AC_PJ * sops) * MJ


def implied_mean_input(energy: float, macs: float, first_macs: float, time_steps: int) -> float:
    """The mean input over all layers but the first with which `energy_mj` gives `energy` (mJ)."""
    return (energy / MJ - MAC_PJ * time_steps * first_macs) / (AC_PJ * time_steps * (macs - first_macs))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution, linear layer or matrix product."""

    name: str
    macs: float  # of one sample at one time step
    mean_input: float | None  # of a product: of its second factor; None where only shapes were known
    density: float | None  # share of the inputs that are not zero
    is_binary: bool  # all inputs are 0 or 1

    def sops(self, time_steps: int) -> float:
        return self.mean_input * time_steps * self.macs


@dataclasses.dataclass(frozen=True)
class EnergyReport:
    """What a network computes, and what that takes, for one sample.

    Attributes:
        layers: in the order of their execution.
        time_steps: T; 1 for a network without spiking neurons.
        firing_rates: mean output of each LIF, by its name; empty for a network without.
        samples: how many were averaged over.
        has_frames: the input differs from step to step, so that the first convolution is needed in each.
    """

    layers: list[Layer]
    time_steps: int
    firing_rates: dict[str, float]
    samples: int
    has_frames: bool

    @property
    def flops(self) -> float:
        """Multiply-accumulates of one time step (the field's "FLOPs")."""
        return sum(layer.macs for layer in self.layers)

    @property
    def sops(self) -> float:
        """Synaptic operations of all time steps, without the first convolution."""
        return sum(layer.sops(self.time_steps) for layer in self.layers[1:])

    @property
    def energy_mj(self) -> float:
        """Energy (mJ) as the paper counts it; 4.6 pJ a MAC for a network without spiking neurons."""
        return self.energy()

    def energy(self, integers: str = INTEGERS[0], first: str = FIRST[0]) -> float:
        """Energy (mJ) in one of the possible accounts.

        Args:
            integers: with SEW residuals some layers get small integers instead of spikes. As "additions" an input n
                is n additions (the paper's mean input); as "multiplications" every input but 0 is one
                multiply-accumulate.
            first: the first convolution of a static image is the same in "every step", and could be computed "once".
        """
        return sum(self.layer_energy(i, integers, first) for i in range(len(self.layers)))

    @property
    def _first_counts(self) -> tuple[str, ...]:
        return FIRST[:1] if self.has_frames else FIRST

    def layer_energy(self, index: int, integers: str = INTEGERS[0], first: str = FIRST[0]) -> float:
        """The share (mJ) of layer `index` in `energy`."""
        layer = self.layers[index]
        if index == 0 or not self.firing_rates:
            return MAC_PJ * layer.macs * (1 if first == "once" else self.time_steps) * MJ
        if integers == "multiplications" and not layer.is_binary:
            return MAC_PJ * layer.density * self.time_steps * layer.macs * MJ
        return AC_PJ * layer.sops(self.time_steps) * MJ

    def summary(self) -> dict:
        """The totals as plain data."""
        accounts = [
            {"integers": integers, "first_convolution": first, "energy_mj": self.energy(integers, first)}
            for integers in INTEGERS
            for first in self._first_counts
        ]
        return {
            "energy_mj": self.energy_mj,
            "accounts": accounts,
            "macs_per_step": self.flops,
            "macs_of_first_convolution": self.layers[0].macs,
            "sops": self.sops,
            "mean_input": self.sops / (self.time_steps * (self.flops - self.layers[0].macs)),
            "time_steps": self.time_steps,
            "samples": self.samples,
        }

    def rows(self) -> list[dict]:
        """The table of the layers."""
        return [
            {
                "layer": layer.name,
                "MACs a step": layer.macs,
                "mean input": layer.mean_input,
                "share not 0": layer.density,
                "input": "real" if i == 0 else "spikes" if layer.is_binary else "integers",
                "SOPs": layer.sops(self.time_steps) if i else 0.0,
                "energy (mJ)": self.layer_energy(i),
            }
            for i, layer in enumerate(self.layers)
        ]

    def __str__(self) -> str:
        """The table of the layers, and the totals, to read."""
        table = tabulate(self.rows(), headers="keys", floatfmt=("", ",.0f", ".4f", ".4f", "", ",.0f", ".6f"))
        return f"{table}\n{self.totals()}"

    def totals(self) -> str:
        """The totals in a few lines."""
        lines = [
            f"energy {self.energy_mj:.4g} mJ a sample: {self.flops / 1e6:,.2f} M MACs a step, T = {self.time_steps}, "
            f"{self.sops / 1e6:,.2f} M SOPs"
        ]
        for kind in INTEGERS if self.firing_rates else ():
            both = ", ".join(
                f"first convolution {first}: {self.energy(kind, first):.4g} mJ" for first in self._first_counts
            )
            lines.append(f"  integers as {kind}, {both}")
        return "\n".join(lines)

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write `NAME.energy.json`, `.csv` (the layers) and `.png` to `folder`; returns their paths."""
        paths = [folder / f"{name}.energy.{kind}" for kind in ("json", "csv", "png")]
        content = self.summary() | {"firing_rates": self.firing_rates, "layers": self.rows()}
        paths[0].write_text(json.dumps(content, indent=2) + "\n")
        write_csv(paths[1], self.rows())
        self.draw(paths[2])
        return paths

    def draw(self, path: Path) -> None:
        """Energy and mean input of each layer as bars."""
        rows, width = self.rows(), max(7, 0.24 * len(self.layers))
        colours = {"real": "tab:red", "spikes": "tab:blue", "integers": "tab:orange"}
        figure = Figure(figsize=(width, 7), layout="constrained")
        energy, inputs = figure.subplots(2, 1, sharex=True)
        for kind, colour in colours.items():
            at = [i for i, row in enumerate(rows) if row["input"] == kind]
            energy.bar(at, [1000 * rows[i]["energy (mJ)"] for i in at], color=colour, label=f"input: {kind}")
            if kind != "real":
                inputs.bar(at, [rows[i]["mean input"] for i in at], color=colour)
        energy.set(ylabel="energy (µJ a sample)", title=self.totals().splitlines()[0])
        energy.legend()
        inputs.set(ylabel="mean input")
        inputs.set_xticks(range(len(rows)), [row["layer"] for row in rows], rotation=90, fontsize=7)
        inputs.margins(x=0.01)
        for axis in (energy, inputs):
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
        figure.savefig(path, dpi=110)


@torch.inference_mode()
def estimate(model: nn.Module, data: Tensor | Iterable) -> EnergyReport:
    """Measure a network, in evaluation mode, on data.

    Args:
        model: one of ours, or any network of convolutions, linear layers and matrix products (as timm's are).
        data: a batch (images [B,C,H,W] or event frames [B,T,C,H,W]), or a loader of batches or of (batch, labels). On
            the meta device MACs are counted from the shapes, with neither inputs nor firing rates.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    with EnergyMeter(model) as meter:
        for batch in [data] if isinstance(data, Tensor) else data:
            model((batch if isinstance(batch, Tensor) else batch[0]).to(device))
    model.train(was_training)
    return meter.report()


class EnergyMeter(TorchFunctionMode):
    """While it is entered, whatever `model` computes is counted; `report()` tells."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.counts: dict[tuple, list[float]] = {}  # (what, name) -> sums over all calls

    def __enter__(self):
        self._inside, self._handles = [], []  # names of the modules that are being executed; how often each multiplied
        for name, module in self.model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._inside.append([name, 0])),
                module.register_forward_hook(lambda *_: self._inside.pop() and None, always_call=True),
            ]
            if isinstance(module, LIF):
                self._handles.append(module.register_forward_hook(lambda *call, name=name: self._fired(name, call[2])))
        self._handles.append(self.model.register_forward_pre_hook(self._started))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._inside and func in _COUNTED:
            macs, driver = _COUNTED[func](result, *args)
            self._inside[-1][1] += 1
            name, call = self._inside[-1]
            is_weighted = isinstance(args[1], nn.Parameter)
            self._add(("layer", name if is_weighted else f"{name} product {call}"), macs, *_statistics(driver))
        return result

    def _started(self, model: nn.Module, args: tuple) -> None:
        x = args[0]
        has_frames = x.dim() == 5
        steps = x.shape[1] if has_frames else getattr(model, "time_steps", 1)
        self._add(("run", ""), len(x), len(x) * steps, has_frames)

    def _fired(self, name: str, spikes: Tensor) -> None:
        self._add(("neurons", name), *_statistics(spikes))

    def _add(self, key: tuple[str, str], *values: float) -> None:
        sums = self.counts.setdefault(key, [0] * len(values))
        self.counts[key] = [a + b for a, b in zip(sums, values, strict=True)]

    def report(self, gather: Callable[[list], list] = list) -> EnergyReport:
        """What was counted so far; `gather` adds the lists of further processes to a list."""
        merged = EnergyMeter(self.model)
        for key, values in gather([(key, [*map(float, values)]) for key, values in self.counts.items()]):
            merged._add(key, *values)
        counts = merged.counts
        samples, steps, frames = counts.pop(("run", ""))
        layers, rates = [], {}
        for (what, name), (*macs, size, total, active, others) in counts.items():
            known = (total / size, active / size) if total == total else (None, None)  # not a number: on meta
            if what == "layer":
                # the head reads the mean over time; spike by spike, it would add in every step
                passes = samples if name == "head" else steps
                layers.append(Layer(name, macs[0] / passes, *known, is_binary=others == 0))
            else:
                rates[name] = known[0]
        return EnergyReport(layers, round(steps / samples), rates, int(samples), frames > 0)


def _statistics(x: Tensor) -> tuple:
    """Of the values of x: how many, their sum, how many are not 0, and how many are neither 0 nor 1."""
    if x.is_meta:
        return x.numel(), float("nan"), float("nan"), 0
    return x.numel(), x.sum(dtype=torch.float64), x.count_nonzero(), ((x != 0) & (x != 1)).sum()


def _convolution(result: Tensor, x: Tensor, weight: Tensor, *_) -> tuple[int, Tensor]:
    return result.numel() * weight[0].numel(), x


def _product(result: Tensor, a: Tensor, b: Tensor, *_) -> tuple[int, Tensor]:
    return result.numel() * a.shape[-1], b


def _linear(result: Tensor, x: Tensor, *_) -> tuple[int, Tensor]:
    return result.numel() * x.shape[-1], x


def _attention(result: Tensor, q: Tensor, k: Tensor, *_) -> tuple[int, Tensor]:
    """Both products of torch's scaled dot-product attention."""
    return (q.numel() + result.numel()) * k.shape[-2], k


_COUNTED = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm), _product),
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}
