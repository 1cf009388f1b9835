"""Export a trained network: as ONNX, compared with torch neuron by neuron, or as safetensors with a model card.

`--format onnx` writes a float32 graph with the neurons unrolled over T and every BatchNorm folded into its convolution:
images [B,C,H,W], or event frames [B,T,C,H,W], to logits [B,num_classes]. ONNX Runtime adds up in another order than
torch, and now and then a membrane within rounding of its threshold spikes in one and not in the other, after which the
logits of that sample differ. So both are compared twice: as they are, and with ONNX Runtime's spikes in torch, where
every logit must agree and every spike that torch would have decided otherwise must be within rounding of its threshold.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import timm.data

from engine.checkpoint import fingerprint
from engine.cli import UserError
from engine.config import EVENT_DATASETS, LOCAL_FIELDS, Config, plain
from engine.log import logger, write_whole
from models import LIF

from . import common
from .model_card import CARD_START, model_card
from .onnx_graph import compare, to_onnx

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
CHECK_BATCH = 7  # samples compared at once, all spikes of which are held; not the 2 of the exporter's example


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

    card = output.with_suffix(".md")
    if card.exists() and not card.read_text(errors="replace").startswith(CARD_START):
        raise UserError(f"{card} is no model card and would be replaced by one: choose another --output")
    weights = {name: value.contiguous() for name, value in subject.model.state_dict().items()}
    config = _settings(subject.cfg)
    metadata = {"format": "pt", "config": config, "sha256": fingerprint(weights, config)}  # Hugging Face asks for "pt"
    _write(output, save(weights, metadata))
    _write(card, model_card(subject, output.name))


def _write(path: Path, content: str | bytes) -> None:
    write_whole(path, content)
    logger.info(f"written: {path} ({len(content) / 1e6:.2f} MB)")


def _parser() -> argparse.ArgumentParser:
    ours = common.parser(f"{__doc__}\nAll further flags are those of test.py, such as --data-path or --ssa-membrane.")
    ours.add_argument("--checkpoint", type=Path, required=True, help="what train.py wrote, or a released file")
    ours.add_argument("--format", choices=tuple(PACKAGES), required=True, help="onnx, or safetensors with a model card")
    ours.add_argument("--output", type=Path, help="file to write (default: beside the checkpoint, with its name)")
    ours.add_argument(
        "--batch", type=common.positive, help="onnx: the only batch size that the file takes (default: any)"
    )
    ours.add_argument("--samples", type=common.positive, default=64, help="onnx: test samples to compare [64]")
    return ours


def run(argv: Sequence[str]) -> None:
    """Export as the command line says."""
    args, flags = _parser().parse_known_args(argv)
    for package in PACKAGES[args.format]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--format {args.format} needs {package} ({error}): pip install -r requirements.txt"
            ) from None
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
    common.main(run)
