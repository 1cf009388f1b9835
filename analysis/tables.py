"""Tables of the paper, with published figures next to computed and measured ones.

    python -m analysis.tables [--results FOLDER ...] [--output-dir FOLDER]

Published figures (*paper*, *log*, *elsewhere*) come from the recipes and published.yml. *here* are means of test.py's
results on complete test sets, for runs that followed a recipe. Prints which results it leaves out, and why.
Writes tables.md and a CSV file per table.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from tabulate import tabulate
from torch import nn

from engine.config import Config, read
from engine.data.recordings import EVENT_DATASETS
from engine.log import logger, setup_console
from engine.run import build_model

from .common import main, parser, published, recipes, write_csv
from .energy import estimate
from .results import averages, by_recipe, data_key, mean, results, verdict

DATA_NAMES = {"torch/cifar10": "CIFAR-10", "torch/cifar100": "CIFAR-100", "dvs128-gesture": "DVS128 Gesture"}
DATA_NAMES |= {"cifar10-dvs": "CIFAR10-DVS", "digits": "digits", "digits-dvs": "event digits"}
DATA_NAMES |= {"cifar10-jpeg": "CIFAR-10, JPEG copy"}
ABLATED = ("torch/cifar100", "cifar10-dvs")  # data sets of the paper's ablations: images, events


def size(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, str]:
    """Count parameters and MACs a step of a network for an input of `shape`, on the meta device."""
    with torch.device("meta"):
        model = build()
    report = estimate(model, torch.empty(shape, device="meta"))
    parameters = sum(p.numel() for p in model.parameters())
    macs = f"{report.flops / 1e9:.3f} G" if report.flops >= 1e9 else f"{report.flops / 1e6:.2f} M"
    return {"parameters": f"{parameters:,}", "MACs a step": macs}


Runs = Mapping[Config, Sequence[dict]]  # results of each recipe and variant


def _given(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}}"


def row(cfg: Config, runs: Runs) -> dict[str, str]:
    """Return the row of a recipe."""
    shape = (1, cfg.in_channels, cfg.input_size, cfg.input_size)
    if cfg.dataset in EVENT_DATASETS:
        shape = (1, *shape)  # one frame
    build = functools.partial(build_model, dataclasses.replace(cfg, time_steps=1))
    paper = _given(cfg.paper_top1) + (" (to be verified)" if cfg.paper_unverified else "")
    paper += f" (top-5 {cfg.paper_top5:.2f})" if cfg.paper_top5 else ""
    energies = [result["energy"]["energy_mj"] for result in runs[cfg] if "energy" in result]
    top1 = [result["top1"] for result in runs[cfg]]
    return {
        **({"data set": DATA_NAMES[data_key(cfg)]} if data_key(cfg) in DATA_NAMES else {}),
        "recipe": Path(cfg.config).stem,
        "network": cfg.model,
        "T": str(cfg.time_steps),
        "input": str(cfg.input_size),
        **size(build, shape),
        "energy (mJ) *paper*": _given(cfg.paper_energy_mj),
        "energy (mJ) *here*": mean(energies, ".3g", count=True),
        "top-1 (%) *paper*": paper,
        "top-1 (%) *log*": _given(cfg.log_top1),
        "top-1 (%) *here*": mean(top1, ".2f", spread=True, count=True),
        "hours *log*": _given(cfg.log_hours, ".1f"),
        "GB a GPU *log*": _given(cfg.log_memory_gb, ".1f"),
    }


def recipe_rows(runs: Runs, datasets: Sequence[str]) -> list[dict]:
    """Return a row for each recipe of the data sets, in their order."""
    configs = [cfg for cfg in runs if data_key(cfg) in datasets and not cfg.variant]
    return [row(cfg, runs) for cfg in sorted(configs, key=lambda cfg: datasets.index(data_key(cfg)))]


def listed(table: dict, runs: Runs) -> list[dict]:
    """Return the rows of a table in published.yml, with parameters and MACs if timm has the network."""
    configs = [cfg for cfg in runs if cfg.dataset in DATA_NAMES and cfg.paper_top1 and not cfg.variant]
    paper = {DATA_NAMES[cfg.dataset]: cfg.paper_top1 for cfg in reversed(configs)}  # the first of several recipes
    rows = []
    for other in table["rows"]:
        given = other | (paper if other["network"] == "QKFormer" else {})
        texts = {key: f"{value:.2f}" if isinstance(value, float) else str(value) for key, value in given.items()}
        unmarked = ("network", "T", "input")
        marked = {key: key if key in unmarked else f"{key} *{table['source']}*" for key in table["columns"]}
        rows.append({name: texts.get(key, "") for key, name in marked.items()})
        if "timm" in other:
            build = functools.partial(timm.create_model, other["timm"])
            rows[-1] |= size(build, (1, 3, other["input"], other["input"]))
    columns = dict.fromkeys(key for row in rows for key in row)
    return [dict.fromkeys(columns, "") | row for row in rows]


def _variants(runs: Runs, dataset: str) -> dict[str, Config]:
    """Return a data set's first recipe under "", and its variants under their names."""
    return {cfg.variant or "": cfg for cfg in reversed([*runs]) if cfg.dataset == dataset}


def ablations(runs: Runs) -> list[dict]:
    """Return a row for each variant, with a group of columns for each data set."""
    names, kept = published("ablations"), ("parameters", "MACs a step", "top-1 (%) *paper*", "top-1 (%) *here*")
    rows = [{"attention, embedding": name, "--variant": variant} for variant, name in names.items()]
    for dataset in ABLATED:
        variants = _variants(runs, dataset)
        for texts, variant in zip(rows, names, strict=True):
            whole = row(variants[variant], runs) if variant in variants else dict.fromkeys(kept, "")
            texts |= {f"{DATA_NAMES[dataset]}: {key}": whole[key] for key in kept}
    return rows


def measured(runs: Runs) -> dict[str, dict[str, Config]]:
    """Return the recipes with results of variants: file name -> variant -> settings."""
    groups = {}
    for cfg in runs:
        if runs[cfg]:
            groups.setdefault(Path(cfg.config).stem, {})[cfg.variant or ""] = cfg
    return {recipe: group for recipe, group in groups.items() if any(group)}


def measurements(runs: Runs) -> list[dict]:
    """Return a row for each measured recipe and variant of the ablations, next to the paper's accuracy."""
    rows, names = [], published("ablations") | published("membranes")
    for recipe, group in measured(runs).items():
        for variant, cfg in group.items():
            dataset = ABLATED[cfg.dataset in EVENT_DATASETS]
            paper, name = _variants(runs, dataset).get(variant, Config()).paper_top1, f" ({DATA_NAMES[dataset]})"
            if cfg.paper_top1:
                paper, name = cfg.paper_top1, ""
            rows.append(
                {"recipe": recipe, "attention, embedding": names.get(variant, variant), "--variant": variant}
                | {"top-1 (%) *paper*": f"{paper:.2f}{name}" if paper else ""}
                | {"parameters": row(cfg, runs)["parameters"], "runs *here*": str(len(runs[cfg]))}
                | {f"{key} *here*": text for key, text in averages(runs[cfg]).items()}
            )
    return rows


def orders(runs: Runs) -> list[dict]:
    """Return a row for each order in the paper: the paper's differences, and measured ones with their `verdict`."""
    rows, names, groups = [], published("ablations"), measured(runs)
    for better, worse in published("orders"):
        texts, given = {"order": f"{names[better]} > {names[worse]}"}, {}
        for dataset in ABLATED:
            variants = _variants(runs, dataset)
            figures = [cfg.paper_top1 for name in (better, worse) if (cfg := variants.get(name)) and cfg.paper_top1]
            given[dataset] = figures[0] - figures[1] if len(figures) == 2 else None
            texts[f"{DATA_NAMES[dataset]} *paper*"] = _given(given[dataset], "+.2f")
        for recipe, group in ((recipe, group) for recipe, group in groups.items() if len(group) > 1):
            top1 = [[run["top1"] for run in runs.get(group.get(name), ())] for name in (better, worse)]
            is_events = next(iter(group.values())).dataset in EVENT_DATASETS
            texts[f"{recipe} *here*"] = verdict(*top1, given[ABLATED[is_events]])
        rows.append(texts)
    return rows


def tables(runs: Runs) -> dict[str, tuple[str, list[dict]]]:
    """Return {name of the CSV file: (title, rows)} of each table."""
    others = {name: (table["title"], listed(table, runs)) for name, table in published("tables").items()}
    return {
        "imagenet": ("ImageNet-1k", recipe_rows(runs, ["imagenet"])),
        "imagenet_others": others.pop("imagenet_others"),
        "imagenet_later": others.pop("imagenet_later"),
        "small": ("CIFAR, event recordings, digits", recipe_rows(runs, [*DATA_NAMES])),
        **others,
        "ablations": ("Ablations", ablations(runs)),
        "ablations_here": ("Ablations measured here", measurements(runs)),
        "orders": ("Orders of the paper, and whether they hold here: difference of top-1 (%)", orders(runs)),
    }


def markdown(title: str, rows: list[dict]) -> str:
    """Format a table; columns of numbers are aligned to the right."""
    are_numbers = [all(not row[key] or row[key][0].isdigit() for row in rows) for key in rows[0]]
    sides = ["right" if is_number else "left" for is_number in are_numbers]
    return f"### {title}\n\n" + tabulate(rows, "keys", "github", colalign=sides, disable_numparse=True)


def run(argv: Sequence[str]) -> None:
    flags = parser(__doc__)
    flags.add_argument("--results", nargs="+", type=Path, help="folders of evaluated runs (output)")
    flags.add_argument("--output-dir", type=Path, default=Path("output/tables"), help="folder to write to")
    args = flags.parse_args(argv)
    setup_console(is_main=True)
    configs = [cfg for path, _ in recipes() for cfg in read(path).all() if cfg.num_classes]  # own_images has none
    runs = by_recipe(results(args.results or [*Path().glob("output")]), configs)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    made = {name: table for name, table in tables(runs).items() if table[1]}  # those with rows
    text = "\n\n".join(markdown(*table) for table in made.values())
    (args.output_dir / "tables.md").write_text(text + "\n")
    for name, (_, rows) in made.items():
        write_csv(args.output_dir / f"{name}.csv", [{k.replace("*", ""): v for k, v in row.items()} for row in rows])
    logger.info(f"{text}\n\nwritten: tables.md and {len(made)} CSV files in {args.output_dir}")


if __name__ == "__main__":
    main(run)
