"""Export a trained network: as ONNX, compared with torch neuron by neuron, or as safetensors with a model card.

`--format onnx` writes a float32 graph with the neurons unrolled over T and every BatchNorm folded into its convolution:
images [B,C,H,W], or event frames [B,T,C,H,W], to logits [B,num_classes]. ONNX Runtime adds up in another order than
torch, and now and then a membrane within rounding of its threshold spikes in one and not in the other, after which the
logits of that sample differ. So both are compared twice: as they are, and with ONNX Runtime's spikes in torch, where
every logit must agree and every spike that torch would have decided otherwise must be within rounding of its threshold.
"""

import argparse
import contextlib
import importlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import timm.data
import torch
import yaml
from torch import Tensor, nn

from engine.config import EVENT_DATASETS, LOCAL_FIELDS, MODEL_FIELDS, Config, plain
from engine.errors import UserError
from engine.log import logger
from models import LIF
from models.neuron import continued, lif_step

from . import common

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
OPSET = 18
TOLERANCE = 1e-5  # of logits, and of a membrane around its threshold
CHECK_BATCH = 7  # samples compared at once, all spikes of which are held; not the 2 of the exporter's example


class Exported(NamedTuple):
    """An ONNX file, and the same graph with the spikes [T,B,...] of every LIF as further outputs, named as modules."""

    product: bytes
    with_spikes: bytes


class Parity(NamedTuple):
    """What ONNX Runtime computes beside torch. Of samples [N], on the CPU.

    Attributes:
        difference: largest |logit difference| of each sample.
        same_class: whether both predict the same.
        followed: as `difference`, with ONNX Runtime's spikes in torch.
        flips: spikes of each sample that torch would have decided otherwise, had it got the same inputs.
        distance: from a membrane to its threshold, the largest where that is so.
        spikes: decisions compared.
    """

    difference: Tensor
    same_class: Tensor
    followed: Tensor
    flips: Tensor
    distance: float
    spikes: int

    def __str__(self) -> str:
        count, beyond = len(self.flips), self.difference > TOLERANCE
        lines = [
            f"{count} samples: largest |logit difference| {self.difference.max():.1e}, within {TOLERANCE:g} in "
            f"{count - beyond.sum()}, the same class in {self.same_class.sum()}",
            f"with ONNX Runtime's spikes in torch: largest |logit difference| {self.followed.max():.1e}",
        ]
        if self.flips.any():
            lines.append(
                f"{self.flips.sum()} of {self.spikes:,} spikes differ by rounding, in {self.flips.count_nonzero()} "
                f"samples: their membranes are at most {self.distance:.1e} from the threshold"
            )
        return "\n".join(lines)

    def require(self) -> None:
        """Raise `UserError` where more than rounding separates the two."""
        unexplained = (self.difference > TOLERANCE) & (self.flips == 0)
        wrong = (unexplained | ~(self.followed <= TOLERANCE)).sum()  # not a number is wrong too
        if wrong or not self.distance <= TOLERANCE:
            raise UserError(
                f"ONNX Runtime does not compute what torch does, so nothing is written: {wrong} of {len(self.flips)} "
                f"samples differ by more than {TOLERANCE:g} (up to {self.followed.max():.1e}) with equal spikes, and "
                f"spikes differ with membranes up to {self.distance:.1e} from the threshold; install the versions of "
                "requirements.txt"
            )


@contextlib.contextmanager
def _hooked(model: nn.Module, after_lif) -> Iterator[None]:
    """Within it `after_lif(name, lif, currents, spikes)` may replace what each LIF of `model` returns."""
    handles = [
        module.register_forward_hook(lambda lif, args, spikes, name=name: after_lif(name, lif, args[0], spikes))
        for name, module in model.named_modules()
        if isinstance(module, LIF)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _WithSpikes(nn.Module):
    """A network that also returns the spikes of each of its LIFs, in the order of `names`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.names = [name for name, module in model.named_modules() if isinstance(module, LIF)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        spikes = {}
        # neurons in steps, as a stream has them: what they write in place otherwise would make a graph of scatters
        with continued({}), _hooked(self.model, lambda name, lif, currents, out: spikes.update({name: out})):
            logits = self.model(x)
        return logits, *(spikes[name] for name in self.names)


def to_onnx(model: nn.Module, x: Tensor, batch: int | None, metadata: dict[str, str]) -> Exported:
    """The graph of a network in evaluation mode, on the CPU.

    Args:
        model: one of ours.
        x: any sample [1,...]; only its shape counts.
        batch: the fixed batch size, or None for any.
        metadata: what to write into the file.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    watched = _WithSpikes(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.onnx.export(
            watched,
            (x.expand(batch or 2, *x.shape[1:]),),  # an example of 1 would make torch take 1 for a constant
            input_names=["input"],
            output_names=["logits", *watched.names],
            dynamic_shapes=None if batch else {"x": {0: "batch"}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    graph = program.model
    ClearMetadataAndDocStringPass()(graph)  # lines of code with the folders of this machine, two thirds of the file
    for value in [*graph.graph.initializers.values()]:
        value.name = value.name.removeprefix("model.")
    graph.metadata_props.update(metadata)
    with_spikes = program.model_proto.SerializeToString()
    del graph.graph.outputs[1:]
    return Exported(program.model_proto.SerializeToString(), with_spikes)


@torch.no_grad()
def compare(model: nn.Module, exported: Exported, batches: Sequence[Tensor]) -> Parity:
    """Run `batches` of samples through torch and ONNX Runtime, on the CPU; raises `UserError` where it cannot."""
    import onnxruntime

    product, with_spikes = (
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]) for content in exported
    )
    names = [output.name for output in with_spikes.get_outputs()][1:]
    columns, distance, count = [], 0.0, 0
    for x in batches:
        (logits,) = product.run(None, {"input": x.numpy()})
        logits = torch.from_numpy(logits)
        watched, *spikes = map(torch.from_numpy, with_spikes.run(None, {"input": x.numpy()}))
        if not torch.equal(watched, logits):
            raise UserError("ONNX Runtime gives other logits once its spikes are looked at: they cannot be explained")
        own = model(x)
        followed, flips, far = _follow(model, x, dict(zip(names, spikes, strict=True)))
        columns.append(
            (
                (logits - own).abs().amax(1),
                logits.argmax(1) == own.argmax(1),
                (logits - followed).abs().amax(1),
                flips,
            )
        )
        distance, count = max(distance, far), count + sum(spike.numel() for spike in spikes)
    return Parity(*map(torch.cat, zip(*columns, strict=True)), distance, count)


def _follow(model: nn.Module, x: Tensor, spikes: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """Logits of `model` where every LIF returns the `spikes` of its name, whatever its currents.

    So each neuron gets what it got where the spikes were computed, and one difference does not lead to others.

    Returns:
        Logits; how many spikes of each sample [B] its own neurons decide otherwise; and how far from the threshold the
        farthest membrane among them is.
    """
    flips, distance = torch.zeros(len(x), dtype=torch.int64), 0.0

    def given(name: str, lif: LIF, currents: Tensor, _) -> Tensor:
        nonlocal flips, distance
        v = torch.zeros_like(currents[0])
        for current, spike in zip(currents, spikes[name], strict=True):  # [B,...] of a time step
            h = torch.empty_like(current)
            own, _ = lif_step(current, v, lif.threshold, h=h)
            differs = own != spike
            flips += differs.flatten(1).sum(1)
            distance = max(distance, ((h - lif.threshold).abs() * differs).max().item())
            v = h * (1 - spike)
        return spikes[name]

    with _hooked(model, given):
        return model(x), flips, distance


def _write_onnx(subject: common.Subject, output: Path, batch: int | None, samples: int) -> None:
    model = subject.model
    if any(isinstance(module, LIF) and module.leak_across_batch for module in model.modules()):
        if batch not in (None, 1):
            raise UserError(
                f"--batch {batch}: with ssa_membrane 'released' a membrane runs over the samples of a batch, so that "
                "answers depend on their neighbours: give --batch 1, or --ssa-membrane per_sample"
            )
        logger.warning(
            "ssa_membrane 'released' runs over the samples of a batch: exported at a batch of 1, where it equals "
            "per_sample, and not at the batch that test.py evaluates (--ssa-membrane per_sample takes any batch)"
        )
        batch = 1
    x, _ = subject.samples(samples)
    if batch and len(x) < batch:
        raise UserError(f"--batch {batch}: comparing takes at least one batch, and there are {len(x)} samples")
    batches = x[: len(x) - len(x) % (batch or 1)].split(batch or CHECK_BATCH)
    logger.info("exporting and comparing, which takes a minute or more")
    exported = to_onnx(model, x[:1], batch, _metadata(subject))
    parity = compare(model, exported, batches)
    logger.info(parity)
    parity.require()
    _write(output, exported.product)


def _metadata(subject: common.Subject) -> dict[str, str]:
    """What a user of the ONNX file needs to know, as text or JSON."""
    cfg = subject.cfg
    about = {
        "model": cfg.model,
        "classes": json.dumps(subject.data.classes),
        "settings": _settings(cfg),
        "versions": json.dumps({package: version(package) for package in ("torch", *PACKAGES["onnx"])}),
    }
    if cfg.dataset in EVENT_DATASETS:
        return about | {"input": "event frames [B,T,C,H,W], float32: events of each polarity counted at each pixel"}
    return about | {
        "input": "images [B,C,H,W], float32: values of 0 to 1, minus mean, divided by std",
        "mean": json.dumps(cfg.mean or timm.data.IMAGENET_DEFAULT_MEAN),
        "std": json.dumps(cfg.std or timm.data.IMAGENET_DEFAULT_STD),
    }


def _settings(cfg: Config) -> str:
    return json.dumps(plain(cfg, without=LOCAL_FIELDS))


def _write_safetensors(subject: common.Subject, output: Path) -> None:
    """Weights under our names, with the settings of a run's checkpoint, and a model card beside them."""
    from safetensors.torch import save

    weights = {name: value.contiguous() for name, value in subject.model.state_dict().items()}
    metadata = {"format": "pt", "config": _settings(subject.cfg)}  # Hugging Face asks for the former
    _write(output, save(weights, metadata))
    _write(output.with_suffix(".md"), _card(subject, output.name).encode())


def _front_matter(cfg: Config, top1: float | None) -> str:
    """What Hugging Face reads, without a license: that is for those who trained the weights."""
    front = {
        "library_name": "qkformer",
        "tags": ["qkformer", "spiking-neural-network", "spiking-transformer", "arxiv:2403.16552"],
        "datasets": [cfg.dataset],
    }
    if cfg.dataset not in EVENT_DATASETS:
        front["pipeline_tag"] = "image-classification"
    if top1 is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": cfg.dataset, "name": cfg.dataset},
            "metrics": [{"type": "accuracy", "value": round(top1, 2), "name": "top-1 (%)"}],
        }
        front |= {"metrics": ["accuracy"], "model-index": [{"name": cfg.model, "results": [result]}]}
    return yaml.safe_dump(front, sort_keys=False)


def _card(subject: common.Subject, name: str) -> str:
    """A model card in Markdown for the weights in the file `name`."""
    cfg, model = subject.cfg, subject.model
    top1 = _measured(subject)
    shape = "event frames [B,T,C,H,W]" if cfg.dataset in EVENT_DATASETS else "images [B,C,H,W]"
    settings = {key: value for key, value in plain(cfg).items() if key in MODEL_FIELDS[1:] and value is not None}
    arguments = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
    size = f"{cfg.input_size} x {cfg.input_size}"
    return f"""---
{_front_matter(cfg, top1)}---

# {cfg.model} on {cfg.dataset}

A spiking transformer of [QKFormer: Hierarchical Spiking Transformer using Q-K
Attention](https://arxiv.org/abs/2403.16552) (Zhou et al., NeurIPS 2024).

| | |
|---|---|
| architecture | `{cfg.model}`, attention {", ".join(model.attention)}; residual {cfg.residual} |
| parameters | {sum(p.numel() for p in model.parameters()):,} |
| time steps T | {cfg.time_steps} |
| membrane of the self-attention (`ssa_membrane`) | {cfg.ssa_membrane} |
| input | {shape}, {cfg.in_channels} x {size} |
| classes | {cfg.num_classes} |
| top-1 on the test set of {cfg.dataset} | {"not measured" if top1 is None else f"{top1:.2f} %"} |

With the code of QKFormer that wrote this file, in its folder:

```python
from engine import checkpoint
from models import create_model

model = create_model(
    {cfg.model!r},
{arguments})
model.load_state_dict(checkpoint.read({name!r})["state_dict"])
model.eval()
```

`python {Path(cfg.config).parent.name}/test.py --checkpoint {name}` evaluates it with the settings it records.
"""


def _measured(subject: common.Subject) -> float | None:
    """Top-1 (%) that test.py wrote for this checkpoint, if it did and nothing has changed since."""
    path = subject.path.with_suffix(".test.json")
    if not path.exists():
        logger.info(f"there is no {path}, so the card has no accuracy: test.py measures it")
        return None
    try:
        found = json.loads(path.read_text())
        ours = json.loads(json.dumps(plain(subject.cfg)))
        keys = (*MODEL_FIELDS, "dataset", "input_size", "mean", "std", "crop_pct")
        is_current = path.stat().st_mtime >= subject.path.stat().st_mtime
        if is_current and all(found[key] == ours[key] for key in keys):
            return float(found["top1"])
    except (ValueError, TypeError, KeyError):
        pass
    logger.info(f"{path} is older than the checkpoint or of other settings, so the card has no accuracy: run test.py")
    return None


def _write(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    logger.info(f"written: {path} ({len(content) / 1e6:.2f} MB)")


def _parser() -> argparse.ArgumentParser:
    ours = common.parser(f"{__doc__}\nAll further flags are those of test.py, such as --data-path or --ssa-membrane.")
    ours.add_argument("--checkpoint", type=Path, required=True, help="what train.py wrote, or a released file")
    ours.add_argument("--format", choices=tuple(PACKAGES), required=True, help="onnx, or safetensors with a model card")
    ours.add_argument("--output", type=Path, help="file to write (default: beside the checkpoint, with its name)")
    ours.add_argument("--batch", type=int, help="onnx: the only batch size that the file takes (default: any)")
    ours.add_argument("--samples", type=int, default=64, help="onnx: test samples to compare [64]")
    return ours


def main(argv: Sequence[str]) -> None:
    """Export as the command line says."""
    args, flags = _parser().parse_known_args(argv)
    for package in PACKAGES[args.format]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--format {args.format} needs {package} ({error}): pip install -r requirements.txt"
            ) from None
    if args.samples < 1 or (args.batch is not None and args.batch < 1):
        raise UserError("--samples and --batch must be at least 1")
    output = args.output or args.checkpoint.with_suffix(f".{args.format}")
    if output.suffix != f".{args.format}" or output.resolve() == args.checkpoint.resolve():
        raise UserError(f"--output {output}: name a new file *.{args.format}")
    subject = common.subject(args.checkpoint, [*flags, "--device", "cpu"])
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "onnx":
        _write_onnx(subject, output, args.batch, args.samples)
    else:
        _write_safetensors(subject, output)


if __name__ == "__main__":
    common.main(main)
