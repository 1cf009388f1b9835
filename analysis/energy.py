"""Energy of one inference as papers report it ("Power (mJ)"), from multiply-accumulates and mean inputs.

E = 4.6 pJ * T * MACs(first convolution) + 0.9 pJ * SOPs (QKFormer, section 4; energies of Horowitz, ISSCC 2014, 45 nm).
SOPs sum mean(input) * T * MACs over all other layers, which include the matrix products of the attention. MACs are
those of one sample at one time step. BatchNorm, pooling and neurons are not counted. The exact synaptic operations add
up the fan-out of each spike, which a padded border or a stride reduces; the head counts once.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models import LIF

from .energy_report import AC_PJ, MAC_PJ, EnergyReport, Layer, energy_mj

__all__ = ["AC_PJ", "MAC_PJ", "EnergyMeter", "EnergyReport", "energy_mj", "estimate"]


@torch.inference_mode()
def estimate(model: nn.Module, data: Tensor | Iterable) -> EnergyReport:
    """Measure a network of this project or of timm, in evaluation mode; raise ValueError for unknown products.

    Args:
        data: a batch (images [B,C,H,W] or event frames [B,T,C,H,W]), or a loader of batches or of (batch, labels). On
            the meta device only MACs are counted.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with EnergyMeter(model) as meter:
            for batch in [data] if isinstance(data, Tensor) else data:
                model((batch if isinstance(batch, Tensor) else batch[0]).to(device))
    finally:
        model.train(was_training)
    return meter.report()


class EnergyMeter(TorchFunctionMode):
    """Context that counts the operations of `model`; `report()` returns the counts."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.counts: dict[tuple, list[float]] = {}  # (kind, name) -> sums over all calls

    def __enter__(self):
        self._inside, self._handles = [], []  # [name, products so far] of each running module; hooks
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
        if self._inside and func in _UNCOUNTED:
            raise ValueError(f"{self._inside[-1][0]}: torch.{func.__name__} is not counted; use matmul")
        if self._inside and func in _COUNTED:
            macs, driver, fan_out = _COUNTED[func](result, *args, **(kwargs or {}))
            self._inside[-1][1] += 1
            name, call = self._inside[-1]
            is_weighted = any(isinstance(value, nn.Parameter) for value in (*args, *(kwargs or {}).values()))
            key = ("layer", name if is_weighted else f"{name} product {call}")
            sops = [] if driver.is_meta else map(fan_out, _events(driver))
            self._add(key, *_statistics(driver), macs, *sops)
        return result

    def _started(self, model: nn.Module, args: tuple) -> None:
        x = args[0]
        has_frames = x.dim() == 5
        own = (module.time_steps for module in model.modules() if hasattr(module, "time_steps"))  # perhaps in a wrapper
        steps = x.shape[1] if has_frames else next(own, 1)
        self._add(("run", ""), len(x), len(x) * steps, has_frames)

    def _fired(self, name: str, spikes: Tensor) -> None:
        self._add(("neurons", name), *_statistics(spikes))

    def _add(self, key: tuple[str, str], *values: float) -> None:
        sums = self.counts.setdefault(key, [0] * len(values))
        self.counts[key] = [a + b for a, b in zip(sums, values, strict=True)]

    def report(self, gather: Callable[[list], list] = list) -> EnergyReport:
        """Return the counts so far; `gather` joins the lists of all ranks."""
        merged = EnergyMeter(self.model)
        for key, values in gather([(key, [*map(float, values)]) for key, values in self.counts.items()]):
            merged._add(key, *values)
        samples, steps, frames = merged.counts.pop(("run", ""))
        layers, rates = [], {}
        for (kind, name), (size, total, active, others, *operations) in merged.counts.items():
            known = (total / size, active / size) if total == total else (None, None)  # NaN on the meta device
            if kind == "layer":
                # the head runs once, on the mean over time
                is_head, (macs, *sops) = name == "head", operations
                macs_a_step, exact = macs / (samples if is_head else steps), tuple(count / samples for count in sops)
                layers.append(Layer(name, macs_a_step, *known, others == 0, exact, is_head))
            else:
                rates[name] = known[0]
        return EnergyReport(layers, round(steps / samples), rates, int(samples), frames > 0)


def _statistics(x: Tensor) -> tuple:
    """Return the number of values of x, their sum, the number not 0, and the number neither 0 nor 1."""
    if x.is_meta:
        return x.numel(), float("nan"), float("nan"), 0
    return x.numel(), x.sum(dtype=torch.float64), x.count_nonzero(), ((x != 0) & (x != 1)).sum()


def _events(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return operations per fan-out of each input, in two accounts: an integer n as n or as 1, a real number as 1."""
    active = x != 0
    return torch.where((x == x.round()).all(), x.abs(), active), active


# each returns MACs, the input that drives them, and a function that sums `_events` times their fan-out


def _convolution(convolve, result: Tensor, input: Tensor, weight: Tensor, bias=None, *args, **kwargs):
    channels, groups = 1 - weight.dim(), input.shape[1 - weight.dim()] // weight.shape[1]

    def operations(events: Tensor) -> Tensor:
        by_group = events.unflatten(channels, (groups, -1)).sum(channels, dtype=torch.float64)  # autocast keeps float64
        ones = torch.ones_like(weight[:groups, :1], dtype=torch.float64)
        return convolve(by_group, ones, None, *args, **kwargs).sum() * len(weight) / groups

    return result.numel() * weight[0].numel(), input, operations


def _uniform(macs: int, driver: Tensor):
    return macs, driver, lambda events: events.sum(dtype=torch.float64) * macs / driver.numel()


def _product(result: Tensor, input: Tensor, other: Tensor):
    return _uniform(result.numel() * input.shape[-1], other)


def _linear(result: Tensor, input: Tensor, *_, **__):
    return _uniform(result.numel() * input.shape[-1], input)


def _attention(result: Tensor, query: Tensor, key: Tensor, *_, **__):
    """Count both products of torch's scaled dot-product attention."""
    return _uniform((query.numel() + result.numel()) * key.shape[-2], key)


_COUNTED = {
    **{convolve: functools.partial(_convolution, convolve) for convolve in (F.conv1d, F.conv2d, F.conv3d)},
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _product),
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}
_UNCOUNTED = (torch.einsum, torch.addmm, torch.baddbmm, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, F.bilinear)
