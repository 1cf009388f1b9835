"""Classify images and recordings with a trained network, in the preprocessing that its checkpoint records.

    python -m engine.predict --checkpoint output/shapes/best.pt photo.png folder/of/photos --csv answers.csv

As a function: `predictor = engine.predict.load("output/shapes/best.pt")`, then `predictor(["photo.png"])`.
"""

import argparse
import csv
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
TOP, DRAWN = 5, 40  # classes of an answer, inputs in a picture
Answer = list[tuple[str, float]]  # the most probable classes with their probabilities, the best first


class Predictor:
    """A trained network with the preprocessing of its inputs and the names of its classes; `load` makes it."""

    def __init__(self, cfg: Config, model: nn.Module, classes: Sequence[str], device: torch.device):
        self.cfg, self.model, self.classes, self.device = cfg, model.to(device).eval(), classes, device
        self.is_of_events, self.batch_size = cfg.in_channels == 2, cfg.eval_batch_size or cfg.batch_size
        self.read = functools.partial(event.read_recording if self.is_of_events else image.read_tensor, cfg=cfg)

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
    path, folder = Path(path), log.ROOT / "imagenet"
    state, sources = checkpoint.read(path), Sources(path, {None: {}}, settings, folder)
    if "config" in settings:
        sources = read(folder / "own_images.yml", ["--config", str(settings["config"])])
        sources.flags.update(settings)
    elif state["format"] != "qkformer" and not recipe_of(path, folder):
        raise UserError(
            f"{path}: does not record its preprocessing; use --config, such as imagenet/qkformer_10_384.yml"
        )
    cfg = settings_of(state, path, sources)
    if cfg.ssa_membrane == "released" and cfg.residual == "sew":
        fix = "--eval-batch-size 1 makes them independent"
        logger.warning(f"warning: ssa_membrane released: answers depend on the other inputs of a batch; {fix}")
    model = build_model(cfg)
    load_weights(cfg, model, state, path)
    names = state.get("classes")
    if not isinstance(names, list) or len(names) != cfg.num_classes:
        names = range(cfg.num_classes)
        if cfg.num_classes == 1000:
            names = [timm.data.ImageNetInfo().index_to_description(i).split(",")[0] for i in names]
    return Predictor(cfg, model, [str(name) for name in names], distributed.setup(device).device)


class _Files(Dataset):
    """Files of inputs, in batches: those that can be read, their samples [B,...], and the errors of the others."""

    def __init__(self, paths: Sequence[Path], predictor: Predictor):
        suffixes = tuple(DECODERS) if predictor.is_of_events else (*IMG_EXTENSIONS, *image.SKIPPED)
        self.read, self.paths = predictor.read, []
        for path in paths:
            inside = path.rglob("*") if path.is_dir() else ()
            inside = [
                p for p in sorted(inside) if p.suffix.lower() in suffixes and not is_hidden(str(p)[len(str(path)) :])
            ]
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
        return list(samples), torch.stack(list(samples.values())) if samples else torch.empty(0), errors


def run(argv: Sequence[str]) -> None:
    """Print and write answers as the command line says; raise `UserError` at the end if files cannot be read."""
    args = _parser().parse_args(argv)
    log.setup_console(is_main=True)
    settings = settings_in(args)
    predictor = load(settings.pop("checkpoint"), **settings)
    if args.stream and not predictor.is_of_events:
        raise UserError("--stream: needs a network of recordings, this one takes images; omit it")
    for path in filter(None, (args.csv, args.json, args.picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
    files, rows, drawn, failed = _Files(args.paths, predictor), [], [], 0
    workers = min(predictor.cfg.workers, os.cpu_count() or 1, len(files) // predictor.batch_size)
    loader = DataLoader(files, predictor.batch_size, num_workers=workers, collate_fn=tuple)
    with logging_redirect_tqdm([logger]):
        for paths, samples, errors in log.progress(loader, "batches", 1, sys.stderr.isatty()):
            for error in errors:
                logger.warning(f"warning: {error}")
            failed += len(errors)
            answers = [predictor.stream(x) for x in samples] if args.stream else [[x] for x in predictor(samples)]
            for path, sample, steps in zip(paths, samples, answers, strict=True):
                for step, answer in enumerate(steps, 1):
                    where = f"{path}, frame {step}/{len(sample)}" if args.stream else path
                    logger.info(f"{where}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in answer)}")
                rows.append({"file": str(path), "answers": [{"class": name, "probability": p} for name, p in answer]})
                drawn += [(path.name, sample, *answer[0])] if len(drawn) < DRAWN else []
    _write(args, rows, drawn, predictor.cfg)
    if failed:
        raise UserError(f"{failed} of {len(files)} files: cannot be read, see the warnings; replace them")


def _write(
    args: argparse.Namespace, rows: list[dict], drawn: list[tuple[str, Tensor, str, float]], cfg: Config
) -> None:
    """Write the answers to the files that flags name."""
    if args.json:
        log.write_whole(args.json, json.dumps(rows, indent=1) + "\n")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file", "rank", "class", "probability"])
            for row in rows:
                table.writerows([row["file"], i, *answer.values()] for i, answer in enumerate(row["answers"], 1))
    if args.picture and drawn:
        show = pictures.of_events
        if cfg.in_channels != 2:
            show = functools.partial(pictures.of_image, *image.statistics(cfg))
        captions = [f"{log.label(file)}\n{log.label(name)} {p:.0%}" for file, _, name, p in drawn]
        samples = [(show(x), caption, "black") for (_, x, *_), caption in zip(drawn, captions, strict=True)]
        pictures.gallery(samples, args.picture, "Inputs as the network sees them, with its answers")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="images or recordings, or folders of them")
    parser.add_argument("--checkpoint", required=True, help="file that train.py wrote, or a released file")
    parser.add_argument("--stream", action="store_true", help="recordings: print the answer after each frame")
    for name, content in {"csv": "a table", "json": "JSON", "picture": "a picture of inputs with answers"}.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"also write {content}")
    add_flags(parser, FLAGS)
    return parser


if __name__ == "__main__":
    with guard():
        run(sys.argv[1:])
