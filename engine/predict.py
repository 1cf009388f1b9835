"""Classify images and recordings with a trained network and the preprocessing that its checkpoint records.

    python -m engine.predict --checkpoint output/shapes/best.pt photo.png folder/of/photos --csv answers.csv

In Python: `predictor = engine.predict.load("output/shapes/best.pt")`, then `predictor(["photo.png"])`.
"""

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.contrib.logging import logging_redirect_tqdm

from . import checkpoint, log
from . import world as distributed
from .cli import UserError, guard
from .config import Config, Parser, Sources, add_flags, read, settings_in
from .data import event, image, pictures
from .data.folders import is_hidden
from .data.frames import DECODERS
from .data.recordings import FRAMES
from .log import logger
from .weights import build_model, load_weights, recipe_of, settings_of, warn_of_silence

FLAGS = "eval_batch_size device workers input_size time_steps sensor_size ssa_membrane use_ema".split()
COLUMNS = ("file", "rank", "class", "probability")
TOP, DRAWN = 5, 80  # classes of an answer, images or frames in a picture
Answer = list[tuple[str, float]]  # the most probable classes with their probabilities, best first


class Predictor:
    """Trained network with the preprocessing of its inputs and the names of its classes; made by `load`.

    With `ssa_membrane="released"` an answer depends on the other inputs of its batch.
    """

    def __init__(self, cfg: Config, model: nn.Module, classes: Sequence[str], device: torch.device):
        self.cfg, self.model, self.classes, self.device = cfg, model.to(device).eval(), classes, device
        self.batch_size, self.is_of_events = cfg.eval_batch_size or cfg.batch_size, cfg.in_channels == 2
        self.read = partial(event.read_recording if self.is_of_events else image.read_tensor, cfg=cfg)
        self.columns = min(8, cfg.time_steps) if self.is_of_events else 10  # of a picture

    def __call__(self, inputs: Sequence[str | Path | Tensor] | Tensor) -> list[Answer]:
        """Return the answer to each input: a file, or a tensor that `read` made of a file."""
        samples = [item if isinstance(item, Tensor) else self.read(Path(item)) for item in inputs]
        batches = torch.stack(samples).split(self.batch_size) if samples else ()
        return [answer for batch in batches for answer in self._answers(self._compute(self.model, batch))]

    def draw(self, sample: Tensor, caption: str) -> list[tuple[Tensor, str]]:
        """Return pictures of an input with their captions, for `pictures.gallery`."""
        if self.is_of_events:
            return pictures.row(sample, caption, self.columns)
        return [(pictures.of_image(*image.statistics(self.cfg), sample), caption)]

    def stream(self, frames: Tensor) -> Iterator[Answer]:
        """Yield the answer after each of a recording's frames [T,2,H,W]."""
        state = None
        for frame in frames.split(1):
            logits, state = self._compute(self.model.step, frame, state)
            yield self._answers(logits)[0]

    @torch.inference_mode()
    def _compute(self, forward: Callable, samples: Tensor, *state: object) -> object:
        with distributed.autocast(self.cfg.eval_amp or self.cfg.amp, self.device):
            return forward(samples.to(self.device), *state)

    def _answers(self, logits: Tensor) -> list[Answer]:
        best = logits.float().softmax(1).topk(min(TOP, logits.shape[1]))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.classes[i], p) for i, p in zip(*row, strict=True)] for row in rows]


def load(path: str | Path, device: str = "auto", **settings: object) -> Predictor:
    """Return the network of a checkpoint, under `settings` of test.py; `config` is the recipe of a file without one."""
    path, recipe, folder = Path(path), settings.get("config"), log.ROOT / "imagenet"
    state = checkpoint.read(path)
    sources = read(recipe) if recipe else Sources(path, {None: {}}, {}, folder / "none", [])
    if not (recipe or state["format"] == "qkformer" or recipe_of(path, folder)):
        raise UserError(f"{path}: no preprocessing recorded; use --config with the recipe of its data set")
    cfg = settings_of(state, path, dataclasses.replace(sources, flags=settings))
    model = build_model(cfg)
    load_weights(cfg, model, state, path)
    names = state.get("classes") or [*image.imagenet_classes().values()]
    classes = names if len(names) == cfg.num_classes else range(cfg.num_classes)
    return Predictor(cfg, model, [str(name) for name in classes], distributed.setup(device).device)


def _files_in(paths: Sequence[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files among the paths, and those with one of the suffixes in folders."""
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*"))
        names = [name for name in names if name.lower().endswith(suffixes) and not is_hidden(name)]
        inside = [path / name for name in names if not (name.endswith(".npy") and FRAMES.match(name))]
        if path.is_dir() and not inside:
            raise UserError(f"{path}: holds none of {', '.join(suffixes)}; name files, or a folder of them")
        files += inside or [path]
    return files


def _read_files(read: Callable[[Path], Tensor], paths: Sequence[Path]) -> tuple[list, list[UserError]]:
    """Return (path, sample) of each readable file, and the errors of others."""
    readable, errors = [], []
    for path in paths:
        try:
            readable.append((path, read(path)))
        except UserError as error:
            errors.append(error)
    return readable, errors


def run(argv: Sequence[str]) -> None:
    """Print and write the answers to files; raise `UserError` at the end if some are damaged."""
    args = _parser().parse_args(argv)
    log.setup_console(is_main=True)
    settings = settings_in(args)
    predictor = load(settings.pop("checkpoint"), **settings)
    if args.stream and not predictor.is_of_events:
        raise UserError("--stream: this network takes images, not recordings; omit it")
    suffixes = tuple(DECODERS) if predictor.is_of_events else (*IMG_EXTENSIONS, *image.SKIPPED)
    files, rows, drawn = _files_in(args.paths, suffixes), [], []
    taken = {path.resolve() for path in (Path(predictor.cfg.checkpoint), *files)}
    for path in filter(None, (args.csv, args.json, args.picture)):
        if path.resolve() in taken:
            raise UserError(f"{path}: is an input, or named twice; choose another file to write")
        taken.add(path.resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.picture:
        pictures.require_format("--picture", args.picture)
    if predictor.cfg.ssa_membrane == "released" and min(predictor.batch_size, len(files)) > 1:
        logger.warning("warning: ssa_membrane released: answers depend on the batch; use --eval-batch-size 1")
    workers = min(predictor.cfg.workers, os.cpu_count() or 1, len(files) // predictor.batch_size)
    read = partial(_read_files, predictor.read)
    loader = DataLoader(files, predictor.batch_size, num_workers=workers, collate_fn=read)
    with logging_redirect_tqdm([logger]):
        for readable, errors in log.progress(loader, "batches", 1, sys.stderr.isatty()):
            for error in errors:
                logger.warning(f"warning: {error}")
            samples = [sample for _, sample in readable]
            if samples and not rows:
                warn_of_silence(predictor.cfg, predictor.model, torch.stack(samples).to(predictor.device))
            answers = map(predictor.stream, samples) if args.stream else ([x] for x in predictor(samples))
            for (path, sample), steps in zip(readable, answers, strict=True):
                for step, answer in enumerate(steps, 1):
                    where = f"{path}, frame {step}/{len(sample)}" if args.stream else path
                    logger.info(f"{where}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in answer)}")
                rows += [dict(zip(COLUMNS, (str(path), i, *best), strict=True)) for i, best in enumerate(answer, 1)]
                caption = f"{log.label(path.name)}\n{log.label(answer[0][0])} ({answer[0][1]:.0%})"
                drawn += predictor.draw(sample, caption) if len(drawn) < DRAWN else []
    if args.json:
        log.write_whole(args.json, json.dumps(rows, indent=1) + "\n")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *(row.values() for row in rows)])
    if args.picture:
        pictures.gallery(drawn, args.picture, "Inputs as the network sees them, with its answers", predictor.columns)
    if failed := len(files) - sum(row["rank"] == 1 for row in rows):
        raise UserError(f"{failed} of {len(files)} files: unreadable, see the warnings; correct or replace them")


def _parser() -> Parser:
    note = "Values in [brackets] are for what neither the checkpoint nor the recipe sets."
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, epilog=note
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="images or recordings, or folders of them")
    parser.add_argument("--stream", action="store_true", help="recordings: print the answer after each frame")
    for name, content in {"csv": "a table", "json": "JSON", "picture": "a picture of inputs with answers"}.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"also write {content}")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a run's best.pt, or a released file")
    about = "recipe with the preprocessing, for files without a record of it, such as cifar10/cifar10.yml"
    parser.add_argument("-c", "--config", metavar="FILE", help=about, default=argparse.SUPPRESS)
    add_flags(parser, FLAGS)
    return parser


if __name__ == "__main__":
    with guard():
        run(sys.argv[1:])
