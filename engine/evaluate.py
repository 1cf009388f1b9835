"""Evaluation: accuracy over a test set, published figures next to it, and the records of test.py."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import log
from . import world as distributed
from .cli import StopRequest, UserError, short
from .config import MODEL_FIELDS, Config, plain, read
from .data import pictures
from .data.loaders import Data
from .log import logger, progress
from .world import World, autocast

DRAWN = 40  # mistakes in a picture
Mistake = tuple[Tensor, int, int]  # image, answer, label


@torch.inference_mode()
def evaluate(
    cfg: Config, world: World, model: nn.Module, loader: Iterable, name: str = "test", stop: StopRequest | None = None
) -> tuple[dict, Tensor | None, list[Mistake]]:
    """Return the accuracy over the whole test set, for any number of ranks, and images and mistakes of this rank.

    The accuracy is `loss` (mean cross-entropy), `top1` and `top5` (percent) and `count` (samples, each once).
    A signal ends the evaluation early.
    """
    model.eval()
    batches, sample, mistakes = [], None, []  # of each batch: loss, top-1, top-5, count
    for images, labels in progress(loader, name, cfg.log_interval, world.is_main):
        sample = images[:32] if sample is None else sample
        with autocast(cfg.eval_amp or cfg.amp, world.device):
            logits = model(images)
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        samples = [losses, hits[:, 0], hits.sum(1), torch.ones_like(losses)]
        batches.append(torch.stack([value.double() for value in samples]).sum(1))
        if len(mistakes) < DRAWN:
            wrong = (~hits[:, 0]).nonzero()[: DRAWN - len(mistakes), 0]
            mistakes += zip(images[wrong].float().cpu(), best[wrong, 0].tolist(), labels[wrong].tolist(), strict=True)
        if stop and stop.signal:
            break
    rows = distributed.gather(torch.stack(batches).tolist() if batches else [])
    if not rows:
        raise UserError("test set: empty; check --data-path")
    # fsum rounds once: the result does not depend on which rank had which batch
    loss, top1, top5, count = map(math.fsum, zip(*rows, strict=True))
    result = {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": int(count)}
    return result, sample, mistakes


def published(cfg: Config) -> Config:
    """Return the recipe of `cfg`, or its variant, if network and data are the same, for its published figures."""
    keys = {*MODEL_FIELDS, "input_size", "split_seed"} - {"ssa_membrane"}  # which is compared with the published one
    if not cfg.dataset.startswith(("wds/", "hfds/")):  # the recipe's data set may have any name there
        keys.add("dataset")
    recipes = (recipe for recipe in read(cfg.config).all() if all(getattr(recipe, k) == getattr(cfg, k) for k in keys))
    return next(recipes, Config())


def _top1(recipe: Config) -> dict[str, float]:
    paper = "paper, to be verified" if recipe.paper_unverified else "paper"
    figures = {paper: recipe.paper_top1, "log": recipe.log_top1}
    return {source: value for source, value in figures.items() if value}


def report(result: dict, recipe: Config, energy) -> None:
    """Print accuracy and energy, and the published figures."""
    logger.info("top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {count} samples".format(**result))
    parts = [f"{value:.2f} % ({source}; {result['top1'] - value:+.2f})" for source, value in _top1(recipe).items()]
    if energy:
        logger.info(energy.totals())
        parts += [f"{recipe.paper_energy_mj:.2f} mJ (paper)"] if recipe.paper_energy_mj else []
    if parts:
        logger.info(f"published: {', '.join(parts)}")


def write(cfg: Config, folder: Path, result: dict, recipe: Config, data: Data, mistakes: list[Mistake], energy) -> None:
    """Write the numbers, the picture of mistakes and, if it was measured, the energy."""
    name = Path(cfg.checkpoint).stem  # several checkpoints may share a folder
    written = [folder / f"{name}.test.json", folder / f"{name}.predictions.png"]
    settings = plain(cfg, without=("config", "output_dir", "energy")) | {"recipe": Path(cfg.config).stem}
    content = {**result, "published_top1": _top1(recipe), **settings, **log.provenance()}
    if energy:
        content["energy"] = energy.summary()
        written += energy.write(folder, name)
    log.write_whole(written[0], json.dumps(content, indent=2) + "\n")
    names = [log.label(name) for name in data.classes]
    drawn = [(data.show(image), f"{names[answer]}\nis {names[label]}") for image, answer, label in mistakes]
    pictures.gallery(drawn, written[1], "Test samples with wrong answers")
    logger.info(f"written: {', '.join(map(str, written))}")


def warn_of_other_classes(names: Sequence[str], state: dict, path: Path | str) -> None:
    """Warn if a checkpoint records other names of classes than the data set has: the labels may not match."""
    if [*names] == [str(i) for i in range(len(names))]:  # shards have no names
        return
    pairs = zip(state.get("classes", ()), (str(name).split(",")[0] for name in names), strict=False)  # no synonyms
    if pair := next((pair for pair in pairs if str(pair[0]).split(",")[0] != pair[1]), None):
        logger.warning(f"warning: {path}: trained with class {short(pair[0])}, the data set has {short(pair[1])}")
