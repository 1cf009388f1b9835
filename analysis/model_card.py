"""Model card of exported weights, in the format that Hugging Face reads."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from engine.config import MODEL_FIELDS, Config, plain
from engine.data.recordings import EVENT_DATASETS
from engine.log import logger

from .common import Subject
from .results import read_result

LIBRARY = "library_name: qkformer\n"  # in every card
TAGS = ["qkformer", "spiking-neural-network", "spiking-transformer", "arxiv:2403.16552"]


def _card_data(cfg: Config, top1: float | None) -> ModelCardData:
    """Return the metadata that Hugging Face reads.

    It names no license, because only those who trained the weights can choose one.
    """
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


def model_card(subject: Subject, name: str) -> str:
    """Return the model card, in Markdown, of the weights in the file `name`."""
    cfg, top1 = subject.cfg, _measured(subject)
    settings = {key: value for key, value in plain(cfg).items() if key in MODEL_FIELDS[1:] and value is not None}
    figures = {
        "metadata": _card_data(cfg, top1).to_yaml(),
        "attention": ", ".join(subject.model.attention),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "shape": "event frames [B,T,C,H,W]" if cfg.dataset in EVENT_DATASETS else "images [B,C,H,W]",
        "top1": "not measured" if top1 is None else f"{top1:.2f} %",
        "arguments": "".join(f"    {key}={value!r},\n" for key, value in settings.items()),
        "folder": Path(cfg.config).parent.name,
        "name": name,
    }
    template = Path(__file__).with_suffix(".md").read_text()
    return str(ModelCard(template.format(**plain(cfg) | figures)))


def _measured(subject: Subject) -> float | None:
    """Return the top-1 (%) that test.py wrote for this checkpoint and these settings, or None."""
    path = subject.path.with_suffix(".test.json")
    result, settings = read_result(path), json.loads(json.dumps(plain(subject.cfg)))
    keys = (*MODEL_FIELDS, "dataset", "input_size", "mean", "std", "crop_pct")
    is_current = result and path.stat().st_mtime >= subject.path.stat().st_mtime
    if is_current and all(result.get(key) == settings[key] for key in keys):
        return result["top1"]
    logger.info(f"{path}: missing, older than the checkpoint or of other settings; run test.py for the card's accuracy")
    return None
