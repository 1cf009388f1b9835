"""Classify images and recordings with a trained network, in the preprocessing that its checkpoint records.

    python -m engine.predict --checkpoint output/shapes/best.pt photo.png folder/of/photos --csv answers.csv

As a function: `predictor = engine.predict.load("output/shapes/best.pt")`, then `predictor(["photo.png"])`.
"""

import csv
import dataclasses
import json
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import timm.data
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.contrib.logging import logging_redirect_tqdm

from . import checkpoint, log
from . import world as distributed
from .cli import UserError, guard
from .config import Config, Parser, Sources, add_flags, read, settings_in
from .data import event, image, pictures
from .data.folders import is_hidden
from .data.frames import DECODERS
from .log import logger
from .weights import build_model, load_weights, recipe_of, settings_of

FLAGS = "config eval_batch_size device workers input_size time_steps sensor_size ssa_membrane use_ema".split()
COLUMNS = ("file", "rank", "class", "probability")
NOTE = "Values in [brackets] are for what neither the checkpoint nor the recipe sets."
TOP, DRAWN = 5, 40  # classes of an answer, inputs in a picture
Answer = list[tuple[str, float]]  # the most probable classes with their probabilities, the best first


class Predictor:
    """A trained network with the preprocessing of its inputs and the names of its classes; `load` makes it."""

    def __init__(self, cfg: Config, model: nn.Module, classes: Sequence[str], device: torch.device):
        self.cfg, self.model, self.classes, self.device = cfg, model.to(device).eval(), classes, device
        self.batch_size, self.is_of_events = cfg.eval_batch_size or cfg.batch_size, cfg.in_channels == 2
        self.read, self.show = partial(event.read_recording, cfg=cfg), pictures.of_events
        if not self.is_of_events:
            self.read = partial(image.read_tensor, cfg=cfg)
            self.show = partial(pictures.of_image, *image.statistics(cfg))

    def __call__(self, inputs: Sequence[str | Path | Tensor] | Tensor) -> list[Answer]:
        """Return the answer to each input: a file, or a tensor as `read` returns it of a file.

        Raises:
            UserError: a file cannot be read.
        """
        samples = [item if isinstance(item, Tensor) else self.read(Path(item)) for item in inputs]
        batches = torch.stack(samples).split(self.batch_size) if samples else ()
        return [answer for batch in batches for answer in self._answers(self._compute(self.model, batch))]

    def stream(self, frames: Tensor) -> Iterator[Answer]:
        """Yield the answer after each of the frames [T,2,H,W] of a recording."""
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
    """Return the network of a checkpoint, ready to answer.

    Args:
        settings: those of test.py that shall differ from the checkpoint's. `config` names the recipe of a file that
            does not record its preprocessing and is no released one.

    Raises:
        UserError: the file is no checkpoint, or nothing tells its preprocessing.
    """
    path, recipe, folder = Path(path), settings.get("config"), log.ROOT / "imagenet"
    state, sources = (
        checkpoint.read(path),
        read(recipe) if recipe else Sources(path, {None: {}}, {}, folder / "none", []),
    )
    if not (recipe or state["format"] == "qkformer" or recipe_of(path, folder)):
        raise UserError(f"{path}: does not record its preprocessing; use --config RECIPE, a file in {folder.name}")
    cfg = settings_of(state, path, dataclasses.replace(sources, flags=settings))
    if cfg.ssa_membrane == "released" and cfg.residual == "sew":
        fix = "--eval-batch-size 1 makes them independent"
        logger.warning(f"warning: ssa_membrane released: answers depend on the other inputs of a batch; {fix}")
    model = build_model(cfg)
    load_weights(cfg, model, state, path)
    describe, numbers = timm.data.ImageNetInfo().index_to_description, range(cfg.num_classes)
    names = state.get("classes") or [describe(i).split(",")[0] for i in range(1000)]
    names = names if len(names) == len(numbers) else numbers
    return Predictor(cfg, model, [str(name) for name in names], distributed.setup(device).device)


class _Files(Dataset):
    """Files of inputs, in batches: those that can be read, their samples [B,...], and the errors of the others."""

    def __init__(self, paths: Sequence[Path], predictor: Predictor):
        suffixes = tuple(DECODERS) if predictor.is_of_events else (*IMG_EXTENSIONS, *image.SKIPPED)
        self.read, self.paths = predictor.read, []
        for path in paths:
            names = sorted(str(file.relative_to(path)) for file in path.rglob("*"))
            inside = [path / name for name in names if name.lower().endswith(suffixes) and not is_hidden(name)]
            if path.is_dir() and not inside:
                raise UserError(f"{path}: holds none of {', '.join(suffixes)}; name files, or a folder of them")
            self.paths += inside or [path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[Path], Tensor, list[str]]:
        samples, errors = {}, []
        for path in (self.paths[i] for i in indices):
            try:
                samples[path] = self.read(path)
            except UserError as error:
                errors.append(str(error))
        return list(samples), torch.stack([*samples.values()]) if samples else torch.empty(0), errors


def run(argv: Sequence[str]) -> None:
    """Print and write answers as the command line says; raise `UserError` at the end if files cannot be read."""
    args = _parser().parse_args(argv)
    log.setup_console(is_main=True)
    settings = settings_in(args)
    predictor = load(settings.pop("checkpoint"), **settings)
    if args.stream and not predictor.is_of_events:
        raise UserError("--stream: needs a network of recordings, this one takes images; omit it")
    files, rows, drawn, failed = _Files(args.paths, predictor), [], [], 0
    taken = {path.resolve() for path in (Path(predictor.cfg.checkpoint), *files.paths)}
    for path in filter(None, (args.csv, args.json, args.picture)):
        if path.resolve() in taken:
            raise UserError(f"{path}: is an input, or named twice; choose another file to write")
        taken.add(path.resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.picture and args.picture.suffix.lower() not in pictures.SUFFIXES:
        raise UserError(f"--picture {args.picture}: unknown format; use {', '.join(pictures.SUFFIXES)}")
    workers = min(predictor.cfg.workers, os.cpu_count() or 1, len(files) // predictor.batch_size)
    loader = DataLoader(files, predictor.batch_size, num_workers=workers, collate_fn=tuple)
    with logging_redirect_tqdm([logger]):
        for paths, samples, errors in log.progress(loader, "batches", 1, sys.stderr.isatty()):
            for error in errors:
                logger.warning(f"warning: {error}")
            failed += len(errors)
            answers = map(predictor.stream, samples) if args.stream else ([x] for x in predictor(samples))
            for path, sample, steps in zip(paths, samples, answers, strict=True):
                for step, answer in enumerate(steps, 1):
                    where = f"{path}, frame {step}/{len(sample)}" if args.stream else path
                    logger.info(f"{where}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in answer)}")
                rows += [dict(zip(COLUMNS, (str(path), i, *best), strict=True)) for i, best in enumerate(answer, 1)]
                caption = f"{log.label(path.name)}\n{log.label(answer[0][0])} ({answer[0][1]:.0%})"
                drawn += [(predictor.show(sample), caption, "black")] if len(drawn) < DRAWN else []
    if args.json:
        log.write_whole(args.json, json.dumps(rows, indent=1) + "\n")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *(row.values() for row in rows)])
    if args.picture:
        pictures.gallery(drawn, args.picture, "Inputs as the network sees them, with its answers")
    if failed:
        raise UserError(f"{failed} of {len(files)} files: cannot be read, see the warnings; replace them")


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False, epilog=NOTE)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="images or recordings, or folders of them")
    parser.add_argument("--stream", action="store_true", help="recordings: print the answer after each frame")
    for name, content in {"csv": "a table", "json": "JSON", "picture": "a picture of inputs with answers"}.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"also write {content}")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a run's best.pt, or a released file")
    add_flags(parser, FLAGS)
    return parser


if __name__ == "__main__":
    with guard():
        run(sys.argv[1:])
