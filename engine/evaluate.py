"""Evaluation: accuracy over a test set, published figures next to it, and the report that test.py writes."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import log
from . import world as distributed
from .cli import StopRequest, UserError, short
from .config import MODEL_FIELDS, Config, plain, read
from .data import pictures
from .log import logger, progress
from .world import World, autocast


@torch.inference_mode()
def evaluate(
    cfg: Config,
    world: World,
    model: nn.Module,
    loader: Iterable,
    name: str = "test",
    on_batch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
    stop_request: StopRequest | None = None,
) -> dict:
    """Return the accuracy over the whole test set, each sample counted once, for any number of ranks.

    Args:
        on_batch: called with the images, labels and logits of each batch of this rank.
        stop_request: a signal ends the evaluation early.

    Returns:
        `loss` (mean cross-entropy), `top1` and `top5` (percent), `count` (samples).
    """
    model.eval()
    batches = []  # of each: loss, top-1, top-5, count
    for images, labels in progress(loader, name, cfg.log_interval, world.is_main):
        with autocast(cfg.eval_amp or cfg.amp, world.device):
            logits = model(images)
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        samples = [losses, hits[:, 0], hits.sum(1), torch.ones_like(losses)]
        batches.append(torch.stack([value.double() for value in samples]).sum(1))
        if on_batch:
            on_batch(images, labels, logits)
        if stop_request and stop_request.signal:
            break
    rows = distributed.gather(torch.stack(batches).tolist() if batches else [])
    if not rows:
        raise UserError("test set: empty; check --data-path")
    # fsum rounds once: the result does not depend on which rank had which batch
    loss, top1, top5, count = map(math.fsum, zip(*rows, strict=True))
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": int(count)}


def published(cfg: Config) -> Config:
    """Return the recipe of `cfg`, or its variant, if network and input are the same, for its published figures.

    `ssa_membrane` may differ, because the comparison of the two is of interest.
    """
    keys = {*MODEL_FIELDS, "input_size", "split_seed"} - {"ssa_membrane"}
    recipes = (recipe for recipe in read(cfg.config).all() if all(getattr(recipe, k) == getattr(cfg, k) for k in keys))
    return next(recipes, Config())


def _top1(recipe: Config) -> dict[str, float]:
    """Return the published accuracies by source."""
    paper = "paper, to be verified" if recipe.paper_unverified else "paper"
    figures = {paper: recipe.paper_top1, "log": recipe.log_top1}
    return {source: value for source, value in figures.items() if value}


def report(cfg: Config, membrane: str, result: dict, recipe: Config) -> None:
    """Print the accuracy with one kind of membrane, and the published figures."""
    which = f" (ssa_membrane {membrane})" if cfg.both_membranes else ""
    logger.info(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} "
        f"on {result['count']} samples{which}"
    )
    parts = [f"{value:.2f} % ({source}; {result['top1'] - value:+.2f})" for source, value in _top1(recipe).items()]
    if parts:
        logger.info(f"published: {', '.join(parts)}")


def write(cfg: Config, folder: Path, results: dict[str, dict], recipe: Config, gallery: "Gallery", energy) -> None:
    """Write the numbers, the picture of the answers and, if it was measured, the energy."""
    name = Path(cfg.checkpoint).stem  # several checkpoints may share a folder
    written = [folder / f"{name}.test.json", folder / f"{name}.predictions.png"]
    settings = plain(cfg, without=("config", "output_dir", "energy")) | {"recipe": Path(cfg.config).stem}
    content = {**next(iter(results.values())), "published_top1": _top1(recipe), **settings, **log.provenance()}
    if cfg.both_membranes:
        content["membranes"] = results
    if energy:
        content["energy"] = energy.summary()
        written += energy.write(folder, name)
    log.write_whole(written[0], json.dumps(content, indent=2) + "\n")
    gallery.draw(written[1])
    logger.info(f"written: {', '.join(map(str, written))}")


class Gallery:
    """Test samples with the model's answers: first the mistakes, then right answers, `rows` x `columns` in all."""

    rows, columns = 4, 10

    def __init__(self, classes: Sequence[str], show: Callable[[Tensor], Tensor]):
        """`show` turns a sample as the network sees it into [H,W,3] or [H,W,1], 0 to 1."""
        self.classes, self.show = classes, show
        self.wrong, self.right = [], []
        self.first: Tensor | None = None  # samples of the first batch, on the device

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Keep what is still needed of a batch: samples [B,...] as the network sees them, logits [B,classes]."""
        self.first = images[:32] if self.first is None else self.first
        size = self.rows * self.columns
        answers = logits.argmax(1)
        for kept, chosen, limit in ((self.wrong, answers != labels, size // 2), (self.right, answers == labels, size)):
            for i in chosen.nonzero()[: limit - len(kept), 0].tolist():
                kept.append((images[i].float().cpu(), labels[i].item(), answers[i].item()))

    def draw(self, path: Path) -> None:
        """Write the picture; mistakes are red, with the truth."""
        samples = []
        for image, label, answer in self.wrong + self.right:
            said, true = (log.label(self.classes[index]) for index in (answer, label))
            caption = (said, "black") if label == answer else (f"{said}\nis {true}", "tab:red")
            samples.append((self.show(image), *caption))
        title = "Test samples with the model's answers; mistakes first, in red"
        pictures.gallery(samples, path, title, self.columns)


def warn_of_other_classes(names: Sequence[str], state: dict, path: Path | str) -> None:
    """Warn if a checkpoint records other names of classes than the data set has: the labels may not match."""
    for old, new in zip(state.get("classes", ()), names, strict=False):
        if old != new:
            logger.warning(f"warning: {path}: trained with class {short(old)}, the data set has {short(new)}")
            break
