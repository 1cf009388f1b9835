"""Export a trained network: as ONNX, compared with torch neuron by neuron, or as safetensors with a model card.

The ONNX graph is float32, with neurons unrolled over T and BatchNorm folded into the convolutions. It sums in another
order than torch, so a membrane within rounding of its threshold may spike in only one of them. The export compares both
as they are, and with ONNX Runtime's spikes in torch, where every logit must agree.
"""

import importlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import timm.data
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from engine.cli import UserError
from engine.config import LOCAL_FIELDS, MODEL_FIELDS, Config, plain
from engine.data.recordings import EVENT_DATASETS
from engine.log import logger, write_whole
from engine.weights import model_arguments
from models import LIF

from . import common
from .onnx_graph import compare, to_onnx
from .results import read_result

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
LIBRARY = "library_name: qkformer\n"  # in every model card
TAGS = ["qkformer", "spiking-neural-network", "spiking-transformer", "arxiv:2403.16552"]
CHECK_BATCH = 7  # samples compared at once, with all spikes in memory; differs from the exporter's example of 2


def _write_onnx(subject: common.Subject, output: Path, batch: int | None, samples: int) -> None:
    model = subject.model
    if any(isinstance(module, LIF) and module.leak_across_batch for module in model.modules()):
        if batch not in (None, 1):
            raise UserError(f"--batch {batch}: ssa_membrane 'released' needs 1; use it, or --ssa-membrane per_sample")
        logger.warning("warning: ssa_membrane 'released' leaks across the batch; exporting for a batch of 1")
        batch = 1
    x, _ = subject.samples(samples)
    if batch and len(x) < batch:
        raise UserError(f"--batch {batch}: larger than the {len(x)} samples to compare; use a smaller one")
    batches = x[: len(x) - len(x) % (batch or 1)].split(batch or CHECK_BATCH)
    logger.info("exporting and comparing (a minute or more)")
    exported = to_onnx(model, x[:1], batch, _metadata(subject))
    parity = compare(model, exported, batches)
    logger.info(parity)
    parity.require()
    _write(output, exported.product)


def _metadata(subject: common.Subject) -> dict[str, str]:
    """Return the metadata of the ONNX file, as text or JSON."""
    cfg = subject.cfg
    about = {
        "model": cfg.model,
        "classes": json.dumps(subject.data.classes),
        "settings": json.dumps(plain(cfg, without=LOCAL_FIELDS)),
        "versions": json.dumps({package: version(package) for package in ("torch", *PACKAGES["onnx"])}),
    }
    if cfg.dataset in EVENT_DATASETS:
        return about | {"input": "event frames [B,T,C,H,W], float32: events of each polarity counted at each pixel"}
    return about | {
        "input": "images [B,C,H,W], float32: values of 0 to 1, minus mean, divided by std",
        "mean": json.dumps(cfg.mean or timm.data.IMAGENET_DEFAULT_MEAN),
        "std": json.dumps(cfg.std or timm.data.IMAGENET_DEFAULT_STD),
    }


def _write_safetensors(subject: common.Subject, output: Path) -> None:
    """Write weights with settings and classes of the checkpoint, and a model card next to them."""
    from safetensors.torch import save

    card = output.with_suffix(".md")
    if card.exists() and LIBRARY not in card.read_text(errors="replace"):
        raise UserError(f"{card}: not a model card, and the new card would overwrite it; use another --output")
    weights = {name: value.contiguous() for name, value in subject.model.state_dict().items()}
    unknown = () if subject.cfg.epochs else ("epochs",)  # see `settings_of`
    metadata = {
        "format": "pt",  # Hugging Face's name of torch
        "config": json.dumps(plain(subject.cfg, without=[*LOCAL_FIELDS, *unknown])),
        "classes": json.dumps(list(subject.classes)),
    }
    _write(output, save(weights, metadata))
    _write(card, _model_card(subject, output.name))


def _card_data(cfg: Config, top1: float | None) -> ModelCardData:
    """Return the metadata that Hugging Face reads, without a license, because the owner of the weights chooses it."""
    task = "image-classification"
    measured = {}
    if top1 is not None:
        result = EvalResult(task, cfg.dataset, cfg.dataset, "accuracy", round(top1, 2), metric_name="top-1 (%)")
        measured = {"metrics": ["accuracy"], "model_name": cfg.model, "eval_results": [result]}
    return ModelCardData(
        library_name="qkformer",
        tags=TAGS,
        datasets=[cfg.dataset],
        pipeline_tag=None if cfg.dataset in EVENT_DATASETS else task,
        **measured,
    )


def _model_card(subject: common.Subject, name: str) -> str:
    """Return the model card, in Markdown, of the weights in the file `name`."""
    cfg, top1 = subject.cfg, _measured(subject)
    figures = {
        "metadata": _card_data(cfg, top1).to_yaml(),
        "attention": ", ".join(subject.model.attention),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "shape": "event frames [B,T,C,H,W]" if cfg.dataset in EVENT_DATASETS else "images [B,C,H,W]",
        "top1": "not measured" if top1 is None else f"{top1:.2f} %",
        "arguments": "".join(f"    {key}={value!r},\n" for key, value in model_arguments(cfg).items()),
        "residual": subject.model.residual,
        "folder": Path(cfg.config).parent.name,
        "name": name,
    }
    template = Path(__file__).with_name("model_card.md").read_text()
    return str(ModelCard(template.format(**plain(cfg) | figures)))


def _measured(subject: common.Subject) -> float | None:
    """Return the top-1 (%) that test.py wrote for this checkpoint and these settings, or None."""
    path = subject.path.with_suffix(".test.json")
    result, settings = read_result(path), json.loads(json.dumps(plain(subject.cfg)))
    keys = (*MODEL_FIELDS, "dataset", "input_size", "mean", "std", "crop_pct", "use_ema")
    is_current = result and path.stat().st_mtime >= subject.path.stat().st_mtime
    if is_current and all(result.get(key) == settings[key] for key in keys):
        return result["top1"]
    logger.info(f"{path}: missing, outdated or with other settings; run test.py to get the accuracy on the card")
    return None


def _write(path: Path, content: str | bytes) -> None:
    write_whole(path, content)
    logger.info(f"written: {path} ({len(content) / 1e6:.2f} MB)")


def run(argv: Sequence[str]) -> None:
    flags = common.checkpoint_parser(__doc__)
    flags.add_argument("--format", choices=[*PACKAGES], required=True, help="onnx, or safetensors with a model card")
    flags.add_argument("--output", type=Path, help="file to write (default: next to the checkpoint, with its name)")
    flags.add_argument("--batch", type=common.positive, help="onnx: the only batch size of the file (default: any)")
    flags.add_argument("--samples", type=common.positive, default=64, help="onnx: test samples to compare [64]")
    args, rest = flags.parse_known_args(argv)
    for package in PACKAGES[args.format]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            remedy = "run pip install -r requirements.txt"
            raise UserError(f"--format {args.format}: {package} cannot be imported ({error}); {remedy}") from None
    output = args.output or args.checkpoint.with_suffix(f".{args.format}")
    if output.suffix != f".{args.format}" or output.resolve() == args.checkpoint.resolve():
        raise UserError(f"--output {output}: not a new *.{args.format} file; use another name")
    subject = common.subject(args.checkpoint, [*rest, "--device", "cpu"])
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "onnx":
        _write_onnx(subject, output, args.batch, args.samples)
    else:
        _write_safetensors(subject, output)


if __name__ == "__main__":
    common.main(run)
