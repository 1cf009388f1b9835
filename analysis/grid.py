"""Runs of a recipe over variants and seeds, one process each, and a table of any runs.

    python -m analysis.grid digits/digits.yml --variants recipe self token --seeds 0 1 [--output-dir FOLDER] [-- FLAGS]
    python -m analysis.grid --compare output/first output/self [--record docs/results [--curves]]

Trains each variant ("recipe" is the recipe itself) with each seed in FOLDER/VARIANT-seedN, and evaluates the last
checkpoint with its energy; FLAGS go to both. The same command resumes and skips finished runs. Writes means over seeds
to grid.md and grid.csv. `--record` copies small files of each run to FOLDER/RECIPE-VARIANT-seedN for analysis.tables.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate

from engine.cli import Stopped, StopRequest, UserError
from engine.config import FIELDS, MODEL_FIELDS, Config, load, plain, read
from engine.log import logger, setup_console
from engine.run import build_model

from . import curves
from .common import main, parser, write_csv
from .results import SETTINGS, averages, differences, read_result, results, settings

ITSELF = "recipe"  # name of the variant without changes
RECORDED = ("config.yml", "run.json", "metrics.jsonl")  # and the result: settings, command and commit, epochs


class Run(NamedTuple):
    """One run of a grid; `flags` are those of train.py that decide its result."""

    recipe: Path
    folder: Path
    flags: list[str]

    def result(self) -> dict | None:
        """Return the result, or None before the run is done; raise `UserError` if it has other settings."""
        path = self.folder / "last.test.json"
        if (result := read_result(path)) is None:
            return None
        cfg = load(self.recipe, self.flags)
        settings = plain(cfg) | {"effective_batch": cfg.batch_size * cfg.accum_iter}  # of one rank
        paths = [path and os.path.abspath(path) for path in (result.get("data_path"), cfg.data_path)]
        different = differences(result, settings) | ({"data_path": paths} if paths[0] != paths[1] else {})
        for key, (value, wanted) in different.items():
            raise UserError(f"{self.folder}: trained with {key} = {value}, not {wanted}; use another --output-dir")
        return result | {"path": path}

    def execute(self) -> bool:
        """Train and evaluate in subprocesses that write to grid.log; return True if both succeed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = ["--config", self.recipe, *self.flags]
        train = ["train.py", *flags, "--output-dir", self.folder, "--resume", "auto"]
        test = ["test.py", *flags, "--checkpoint", self.folder / "last.pt", "--energy"]
        return self._call(*train) == 0 and self._call(*test) == 0

    def _call(self, script: str, *flags: object) -> int:
        """Return a script's exit code; forward signals, because training saves before it ends."""
        command = [sys.executable, str(self.recipe.parent / script), *map(str, flags)]
        with (self.folder / "grid.log").open("a") as log, StopRequest() as stop:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            while process.poll() is None and not stop.signal:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
            if stop.signal:
                process.send_signal(stop.signal)
                process.wait()
                raise Stopped(stop.signal, f"in {self.folder}")
        return process.returncode


def plan(recipe: Path, variants: Sequence[str] | None, seeds: Sequence[int], out: Path, flags: list[str]) -> list[Run]:
    """Return the runs, ordered by seed, then by variant."""
    if not (recipe.parent / "train.py").exists():
        raise UserError(f"{recipe}: no train.py next to it; pass a recipe such as digits/digits.yml")
    known = [ITSELF if name is None else name for name in read(recipe).recipes]
    if unknown := [variant for variant in variants or () if variant not in known]:
        raise UserError(f"--variants {unknown[0]}: unknown; {recipe} has {', '.join(known)}")
    chosen = {name: [] if name == ITSELF else ["--variant", name] for name in variants or known}
    for variant in chosen.values():
        load(recipe, [*variant, *flags, "--energy"])  # now, not after the training
    return [
        Run(recipe, out / f"{name}-seed{seed}", [*variant, "--seed", str(seed), *flags])
        for seed in seeds
        for name, variant in chosen.items()
    ]


def train(runs: Sequence[Run]) -> list[str]:
    """Train the runs that are not finished; return the folders of those that failed."""
    pending, failed = [run for run in runs if not run.result()], []
    logger.info(f"runs: {len(runs)}, finished: {len(runs) - len(pending)}")
    for i, run in enumerate(pending, 1):
        logger.info(f"run {i}/{len(pending)}: {run.folder}, output in grid.log")
        if run.execute():
            logger.info(f"  top-1 {run.result()['top1']:.2f} %")
        else:
            failed.append(str(run.folder))
            logger.warning(f"  failed: {(run.folder / 'grid.log').read_text().strip().splitlines()[-1]}")
    return failed


def summary(evaluated: Sequence[dict]) -> list[dict]:
    """Return a row of means over seeds for each group of equal settings; it lists those that differ on a data set."""
    groups, values = {}, {}
    for result in evaluated:
        groups.setdefault(json.dumps(settings(result)), []).append(result | settings(result))
        for key, value in settings(result).items():
            values.setdefault((result["dataset"], key), []).append(value)
    differing = {pair for pair, every in values.items() if any(value != every[0] for value in every)}
    return [_row(group, differing) for group in groups.values()]


def _row(group: Sequence[dict], differing: set[tuple[str, str]]) -> dict[str, str]:
    first = group[0]
    changes = {key: first[key] for key in SETTINGS if (first["dataset"], key) in differing}
    changes = {key: value for key, value in changes.items() if value != FIELDS[key].default}
    with torch.device("meta"):
        model = build_model(Config(**{key: first[key] for key in MODEL_FIELDS}))
    return {
        "data set": first["dataset"],
        "variant": first.get("variant") or ITSELF,
        "settings": json.dumps(changes)[1:-1].replace('"', ""),
        "epochs": first["epochs"],
        "seeds": " ".join(str(result.get("seed")) for result in group),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **averages(group),
    }


def record(evaluated: Sequence[dict], target: Path, has_curves: bool) -> None:
    """Copy small files to `target`, with relative paths; raise `UserError` if a run there has other settings."""
    recorded = set()
    for result in evaluated:
        name = "-".join(filter(None, (result.get("recipe"), result.get("variant"), f"seed{result.get('seed')}")))
        source, folder = result["path"].parent, target / name
        if folder in recorded:
            raise UserError(f"{folder}: {source} is another run of the same name; use another --record")
        recorded.add(folder)
        older = read_result(folder / result["path"].name) or result
        for key, (value, wanted) in differences(older, settings(result)).items():
            raise UserError(f"{folder}: has {key} = {value}, {source} {wanted}; use another --record")
        folder.mkdir(parents=True, exist_ok=True)
        for path in (result["path"], *(source / name for name in RECORDED)):
            (folder / path.name).write_text(path.read_text().replace(f"{Path.cwd()}/", ""))
        if has_curves:
            curves.draw([curves.run_curve(source, name)], folder / "curves.png")
    logger.info(f"recorded: {len(evaluated)} runs in {target}")


def show(evaluated: Sequence[dict], folder: Path | None, argv: Sequence[str]) -> None:
    """Print the table, and write it with the command `argv` to a folder if one is given."""
    if not evaluated:
        raise UserError("results: none; run test.py on the runs")
    rows = summary(evaluated)
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    logger.info(text)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "grid.md").write_text(f"{text}\n\n`python -m analysis.grid {shlex.join(argv)}`\n")
        write_csv(folder / "grid.csv", rows)
        logger.info(f"written: grid.md and grid.csv in {folder}")


def run(argv: Sequence[str]) -> None:
    at = argv.index("--") if "--" in argv else len(argv)
    flags = parser(__doc__)
    flags.add_argument("recipe", nargs="?", type=Path, help="recipe to train, such as digits/digits.yml")
    flags.add_argument("--variants", nargs="+", help=f"variants of the recipe; {ITSELF} is the recipe itself (all)")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each variant (0 1 2)")
    flags.add_argument("--output-dir", type=Path, help="folder of the runs and the table (output/grid/RECIPE)")
    flags.add_argument("--compare", nargs="+", type=Path, metavar="RUN", help="show these runs and train nothing")
    flags.add_argument("--record", type=Path, metavar="FOLDER", help="copy the small files of each run to this folder")
    flags.add_argument("--curves", action="store_true", help="with --record, copy the learning curves too")
    args = flags.parse_args(argv[:at])
    setup_console(is_main=True)
    if not args.compare and not args.recipe:
        raise UserError("recipe: missing; pass one such as digits/digits.yml, or --compare RUN ...")
    failed = []
    if args.compare:
        evaluated, out = results(args.compare), args.output_dir
    else:
        out = args.output_dir or Path("output/grid", args.recipe.stem)
        runs = plan(args.recipe, args.variants, args.seeds, out, list(argv[at + 1 :]))
        failed = train(runs)
        evaluated = [result for run in runs if (result := run.result())]
    show(evaluated, out, argv)
    if args.record:
        record(evaluated, args.record, args.curves)
    if failed:
        raise UserError(f"{', '.join(failed)}: failed; see grid.log there, then run the same command again")


if __name__ == "__main__":
    main(run)
