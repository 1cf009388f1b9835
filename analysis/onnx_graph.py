"""Export of a network as an ONNX graph, and comparison of ONNX Runtime with torch, neuron by neuron."""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.cli import UserError
from models import LIF

from .common import hooked

OPSET = 18
TOLERANCE = 1e-5  # of logits, and of a membrane around its threshold


class Exported(NamedTuple):
    """ONNX file, and its graph with the spikes [T,B,...] of every LIF as more outputs, named like the modules."""

    product: bytes
    with_spikes: bytes


class Parity(NamedTuple):
    """Comparison of ONNX Runtime with torch for samples [N] on the CPU."""

    difference: Tensor  # largest |logit difference| of each sample
    same_class: Tensor  # both predict the same class
    followed: Tensor  # like `difference`, with ONNX Runtime's spikes in torch
    flips: Tensor  # spikes of each sample that differ in torch, given the same inputs
    distance: float  # largest distance of their membranes to the threshold
    spikes: int  # decisions compared

    def __str__(self) -> str:
        count, beyond = len(self.flips), self.difference > TOLERANCE
        return (
            f"{count} samples: largest |logit difference| {self.difference.max():.1e}, within {TOLERANCE:g} in "
            f"{count - beyond.sum()}, the same class in {self.same_class.sum()}\n"
            f"with ONNX Runtime's spikes in torch: largest |logit difference| {self.followed.max():.1e}\n"
            f"{self.flips.sum()} of {self.spikes:,} spikes differ by rounding, in {self.flips.count_nonzero()} samples "
            f"with membranes at most {self.distance:.1e} from the threshold"
        )

    def require(self) -> None:
        """Raise `UserError` if the two differ by more than rounding."""
        unexplained = (self.difference > TOLERANCE) & (self.flips == 0)
        wrong = (unexplained | ~(self.followed <= TOLERANCE)).sum()  # NaN is wrong, too
        if wrong or not self.distance <= TOLERANCE:
            raise UserError(
                f"ONNX Runtime: {wrong} of {len(self.flips)} samples differ from torch by more than {TOLERANCE:g} (up "
                f"to {self.followed.max():.1e}) with equal spikes, and spikes differ with membranes up to "
                f"{self.distance:.1e} from the threshold; install the versions of requirements.txt"
            )


def _lifs(model: nn.Module) -> dict[str, LIF]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LIF)}


class _WithSpikes(nn.Module):
    """Network that also returns the spikes of each LIF, in the order of `names`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.names = list(_lifs(model))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        spikes = {}
        lifs = _lifs(self.model).items()
        with hooked({lif: lambda _, out, name=name: spikes.update({name: out}) for name, lif in lifs}):
            logits = self.model(x)
        return logits, *(spikes[name] for name in self.names)


@torch.no_grad()  # else the graph computes surrogate gradients too
def to_onnx(model: nn.Module, x: Tensor, batch: int | None, metadata: dict[str, str]) -> Exported:
    """Export a network in evaluation mode for samples like `x` [1,...]; `batch` None allows any batch size."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    watched = _WithSpikes(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        program = torch.onnx.export(
            watched,
            (x.expand(batch or 2, *x.shape[1:]),),  # torch makes a batch of 1 constant
            input_names=["input"],
            output_names=["logits", *watched.names],
            dynamic_shapes=None if batch else {"x": {0: "batch"}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    graph = program.model
    ClearMetadataAndDocStringPass()(graph)  # drops source lines with local paths, two thirds of the file
    for value in [*graph.graph.initializers.values()]:
        value.name = value.name.removeprefix("model.")
    graph.metadata_props.update(metadata)
    with_spikes = program.model_proto.SerializeToString()
    del graph.graph.outputs[1:]
    return Exported(program.model_proto.SerializeToString(), with_spikes)


@torch.no_grad()
def compare(model: nn.Module, exported: Exported, batches: Sequence[Tensor]) -> Parity:
    """Run `batches` of samples through torch and ONNX Runtime, on the CPU; raise `UserError` if the graphs disagree."""
    import onnxruntime

    product, with_spikes = (onnxruntime.InferenceSession(x, providers=["CPUExecutionProvider"]) for x in exported)
    names = [output.name for output in with_spikes.get_outputs()][1:]
    columns, distance, count = [], 0.0, 0
    for x in batches:
        (logits,) = product.run(None, {"input": x.numpy()})
        logits = torch.from_numpy(logits)
        watched, *spikes = map(torch.from_numpy, with_spikes.run(None, {"input": x.numpy()}))
        if not torch.equal(watched, logits):
            raise UserError("ONNX Runtime: logits change if spikes are outputs; install from requirements.txt")
        reference = model(x)
        followed, flips, far = _follow(model, x, dict(zip(names, spikes, strict=True)))
        differences = ((logits - other).abs().amax(1) for other in (reference, followed))
        columns.append((next(differences), logits.argmax(1) == reference.argmax(1), next(differences), flips))
        distance, count = max(distance, far), count + sum(spike.numel() for spike in spikes)
    return Parity(*map(torch.cat, zip(*columns, strict=True)), distance, count)


def _follow(model: nn.Module, x: Tensor, spikes: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """Run `model` with the given `spikes` as the output of every LIF, because one difference would cause others.

    Return logits, the numbers [B] of spikes that differ, and the largest distance of their membranes to the threshold.
    """
    flips, distance = torch.zeros(len(x), dtype=torch.int64), 0.0

    def given(name: str, lif: LIF, currents: Tensor, _) -> Tensor:
        nonlocal flips, distance
        v = torch.zeros_like(currents[0])
        for current, spike in zip(currents, spikes[name], strict=True):  # [B,...] of a time step
            h = lif.charge(current, v)
            differs = (h >= lif.threshold) != spike
            flips += differs.flatten(1).sum(1)
            distance = max(distance, ((h - lif.threshold).abs() * differs).max().item())
            v = h * (1 - spike)
        return spikes[name]

    with hooked({lif: functools.partial(given, name, lif) for name, lif in _lifs(model).items()}):
        return model(x), flips, distance
