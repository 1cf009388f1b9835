"""The paper's tables, with published figures next to computed and measured ones.

    python -m analysis.tables [--results FOLDER ...] [--output-dir FOLDER]

Parameters and MACs are computed from the networks. Columns marked *paper* and *log* repeat published figures. Columns
marked *here* come from the files NAME.test.json that test.py wrote on complete test sets, of networks trained as the
recipe says. They are means where seeds differ, and empty where there is no file. Writes tables.md and a CSV file per
table.
"""

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import yaml
from tabulate import tabulate
from torch import nn

from engine.cli import UserError
from engine.config import FIELDS, LOCAL_FIELDS, MODEL_FIELDS, PUBLISHED, Config, plain, read
from engine.data.recordings import EVENT_DATASETS
from engine.log import logger, setup_console
from engine.run import build_model

from .common import ROOT, main, parser, recipes, write_csv
from .energy import estimate

# samples of the complete test sets; results on fewer stay out of the tables
TEST_SAMPLES = {"imagefolder": 50_000, "torch/cifar10": 10_000, "torch/cifar100": 10_000, "dvs128-gesture": 288}
TEST_SAMPLES |= {"cifar10-dvs": 1_000, "digits": 360, "digits-dvs": 360}
DATA_NAMES = {"torch/cifar10": "CIFAR-10", "torch/cifar100": "CIFAR-100", "dvs128-gesture": "DVS128 Gesture"}
DATA_NAMES |= {"cifar10-dvs": "CIFAR10-DVS", "digits": "digits", "digits-dvs": "digits, as events"}
# settings that decide the accuracy of a network; seeds may differ because they are averaged
_OTHERS = "variant effective_batch seed eval_batch_size eval_amp channels_last grad_checkpointing".split()
TRAINING = [key for key in FIELDS if key not in (*LOCAL_FIELDS, *MODEL_FIELDS, *PUBLISHED, *_OTHERS)]
ABLATIONS = {  # variant -> the paper's name of the row
    None: "Q-K token + self-attention",
    "no_speds": "the same without SPEDS",
    "spikformer_no_scaling": "Spikformer without scaling",
    "spikformer": "Spikformer",
    "spikformer_speds": "Spikformer with SPEDS",
    "channel_self": "Q-K channel + self-attention",
    "token_channel": "Q-K token + Q-K channel",
    "self": "self-attention alone",
    "channel": "Q-K channel alone",
    "token": "Q-K token alone",
    "ms": "Q-K token + self, membrane shortcuts",
}


def size(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, str]:
    """Count parameters and MACs a step of a network for an input of `shape`, from shapes alone."""
    with torch.device("meta"):
        model = build()
    report = estimate(model, torch.empty(shape, device="meta"))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": f"{parameters:,}", "MACs a step": _millions(report.flops)}


def _millions(macs: float) -> str:
    return f"{macs / 1e9:.3f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"


def results(folders: Sequence[Path]) -> list[dict]:
    """Return the newest test.json of each run folder in or below `folders`; warn about those left out."""
    newest, seen = {}, set()
    for path in sorted(path for folder in folders for path in folder.rglob("*.test.json")):
        if (result := _read(path)) is None:
            logger.warning(f"{path}: left out, test.py did not write it")
        elif result["count"] != TEST_SAMPLES.get(result["dataset"]):
            logger.warning(f"{path}: left out, {result['count']} samples are not the test set of {result['dataset']}")
        elif (text := json.dumps(result)) not in seen:
            seen.add(text)
            last = newest.get(path.parent)
            if last is None or result["time"] > last["time"]:
                newest[path.parent] = result | {"path": path}
    return list(newest.values())


def _read(path: Path) -> dict | None:
    """Return the content of a file, or None if test.py did not write it."""
    try:
        content = json.loads(path.read_text())
        figures = [content["top1"] / 100, content.get("energy", {"energy_mj": 0})["energy_mj"]]
        texts = [content[key] for key in ("time", "dataset", "model")]
        is_result = figures[0] <= 1 and all(0 <= x < math.inf for x in figures) and isinstance(content["count"], int)
        return content if is_result and all(isinstance(text, str) for text in texts) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        return None


def measured(cfg: Config, found: Sequence[dict]) -> dict[str, str]:
    """Average accuracy and energy of the results with the network, data and input of `cfg`, trained as it says."""
    wanted, mine = plain(cfg), []
    for result in found:
        if all(result.get(key) == wanted[key] for key in ("dataset", "input_size", "split_seed", *MODEL_FIELDS)):
            different = [key for key in TRAINING if result.get(key, FIELDS[key].default) != wanted[key]]
            if different:
                key = different[0]
                values = f"{key} is {result.get(key)}, the recipe has {wanted[key]}"
                logger.warning(f"{result['path']}: left out, {values}")
            else:
                mine.append(result)
    energies = [result["energy"]["energy_mj"] for result in mine if "energy" in result]
    top1 = [result["top1"] for result in mine]
    spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    return {"energy": _mean(energies, ".3g", ""), "top1": _mean(top1, ".2f", spread)}


def _mean(values: Sequence[float], form: str, spread: str) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):{form}}{spread}" + (f" ({len(values)} runs)" if len(values) > 1 else "")


def _given(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def row(cfg: Config, found: Sequence[dict]) -> dict[str, str]:
    """Return the row of a recipe."""
    shape = (1, cfg.in_channels, cfg.input_size, cfg.input_size)
    if cfg.dataset in EVENT_DATASETS:
        shape = (1, *shape)  # one frame
    here = measured(cfg, found)
    build = functools.partial(build_model, dataclasses.replace(cfg, time_steps=1))
    return {
        **({"data set": DATA_NAMES[cfg.dataset]} if cfg.dataset in DATA_NAMES else {}),
        "network": cfg.model,
        "T": str(cfg.time_steps),
        "input": str(cfg.input_size),
        **size(build, shape),
        "energy (mJ) *paper*": _given(cfg.paper_energy_mj),
        "energy (mJ) *here*": here["energy"],
        "top-1 (%) *paper*": _given(cfg.paper_top1),
        "top-1 (%) *log*": _given(cfg.log_top1),
        "top-1 (%) *here*": here["top1"],
    }


def imagenet(found: Sequence[dict]) -> list[dict]:
    """Return a row for each recipe, then for the paper's other networks."""
    rows = [row(cfg, found) for _, cfg in recipes("imagenet") if cfg.dataset == "imagefolder"]
    published = yaml.safe_load((Path(__file__).parent / "published.yml").read_text())
    empty = dict.fromkeys(rows[0], "")
    for other in published["snn"]:
        texts = {"network": other["network"], "T": "4", "input": "224"}
        rows.append(empty | texts | {"energy (mJ) *paper*": _given(other["energy_mj"])})
    for other in published["ann"]:
        build = functools.partial(timm.create_model, other["timm"])
        side = timm.get_pretrained_cfg(other["timm"]).input_size[-1]
        texts = {"network": f"{other['network']} (not spiking)", "input": str(side)} | size(build, (1, 3, side, side))
        rows.append(empty | texts | {"energy (mJ) *paper*": _given(other["energy_mj"])})
    return rows


def others(found: Sequence[dict]) -> list[dict]:
    """Return a row for each recipe of CIFAR, the event recordings and the digits."""
    folders = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "digits", "digits-dvs")
    return [row(cfg, found) for folder in folders for _, cfg in recipes(folder) if cfg.dataset in DATA_NAMES]


def ablations(found: Sequence[dict]) -> list[dict]:
    """Return both data sets of the paper's ablations side by side."""
    rows = [{"attention, embedding": name, "--variant": variant or ""} for variant, name in ABLATIONS.items()]
    for path in (ROOT / "cifar100/cifar100.yml", ROOT / "cifar10-dvs/cifar10-dvs.yml"):
        configs = {cfg.variant: cfg for cfg in read(path).all()}
        for texts, variant in zip(rows, ABLATIONS, strict=True):
            whole = row(configs[variant], found)
            name = whole["data set"]
            kept = ("parameters", "MACs a step", "top-1 (%) *paper*", "top-1 (%) *here*")
            texts |= {f"{name}: {key}": whole[key] for key in kept}
    return rows


def markdown(title: str, rows: list[dict]) -> str:
    """Format a table; columns of numbers are aligned to the right."""
    are_numbers = [all(not row[key] or row[key][0].isdigit() for row in rows) for key in rows[0]]
    sides = ["right" if is_number else "left" for is_number in are_numbers]
    return f"### {title}\n\n" + tabulate(rows, "keys", "github", colalign=sides, disable_numparse=True)


def run(argv: Sequence[str]) -> None:
    flags = parser(__doc__)
    flags.add_argument("--results", nargs="+", type=Path, help="folders of runs that test.py evaluated (output)")
    flags.add_argument("--output-dir", type=Path, default=Path("output/tables"), help="folder to write to")
    args = flags.parse_args(argv)
    setup_console(is_main=True)
    if missing := [str(folder) for folder in args.results or () if not folder.is_dir()]:
        raise UserError(f"--results {missing[0]}: no such folder; name folders of runs")
    found = results(args.results or [Path("output")])
    tables = {  # name of the CSV file -> title, rows
        "imagenet": ("ImageNet-1k", imagenet(found)),
        "small": ("CIFAR, event recordings, digits", others(found)),
        "ablations": ("Ablations", ablations(found)),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(markdown(*table) for table in tables.values())
    (args.output_dir / "tables.md").write_text(text + "\n")
    for name, (_, rows) in tables.items():
        write_csv(args.output_dir / f"{name}.csv", [{k.replace("*", ""): v for k, v in row.items()} for row in rows])
    logger.info(f"{text}\n\nwritten: tables.md and {len(tables)} CSV files in {args.output_dir}")


if __name__ == "__main__":
    main(run)
