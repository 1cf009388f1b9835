"""A model card for a file of weights: Markdown under the front matter that Hugging Face reads."""

import json
from pathlib import Path

import yaml

from engine.config import EVENT_DATASETS, MODEL_FIELDS, Config, plain
from engine.log import logger

from .common import Subject

CARD_START = "---\nlibrary_name: qkformer\n"


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


def model_card(subject: Subject, name: str) -> str:
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


def _measured(subject: Subject) -> float | None:
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
