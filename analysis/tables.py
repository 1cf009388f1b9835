"""The paper's tables: published figures beside what is computed and what was measured.

    python -m analysis.tables [--results FOLDER ...] [--output-dir FOLDER]

Parameters and MACs are computed from the networks as they are built. Columns marked *paper* and *log* repeat what was
published. Columns marked *here* come from the files NAME.test.json that test.py wrote on complete test sets, of
networks that were trained as the recipe says; they are empty where there is none, and means where seeds differ. Writes
tables.md, tables.html and a CSV file per table.
"""

import dataclasses
import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import yaml
from tabulate import tabulate
from torch import nn

from engine.cli import UserError
from engine.config import EVENT_DATASETS, FIELDS, LOCAL_FIELDS, MODEL_FIELDS, PUBLISHED, Config, plain, read
from engine.log import logger, setup_console
from engine.run import build_model

from .common import ROOT, main, parser, recipes, write_csv
from .energy import estimate

# complete test sets: only results on all of it stand in a table
TEST_SAMPLES = {"imagefolder": 50_000, "torch/cifar10": 10_000, "torch/cifar100": 10_000, "dvs128-gesture": 288}
TEST_SAMPLES |= {"cifar10-dvs": 1_000, "digits": 360, "digits-dvs": 360}
DATA_NAMES = {"torch/cifar10": "CIFAR-10", "torch/cifar100": "CIFAR-100", "dvs128-gesture": "DVS128 Gesture"}
DATA_NAMES |= {"cifar10-dvs": "CIFAR10-DVS", "digits": "digits", "digits-dvs": "digits, as events"}
# what decides how good a network gets, besides what it is; seeds may differ, for they are averaged
_OTHERS = "variant effective_batch seed eval_batch_size eval_amp channels_last grad_checkpointing".split()
TRAINING = [key for key in FIELDS if key not in (*LOCAL_FIELDS, *MODEL_FIELDS, *PUBLISHED, *_OTHERS)]
ABLATIONS = {  # variant -> how the paper names the row
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
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>QKFormer: tables</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 2.5rem }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #ddd; white-space: nowrap }
thead th { border-bottom: 2px solid #555 }
tbody tr:hover { background: #f4f6fa }
</style>
<h1>QKFormer: tables</h1>
"""


@dataclass(frozen=True)
class Table:
    name: str  # of its CSV file
    title: str
    rows: list[dict]

    def write(self, tablefmt: str) -> str:
        numbers = ["left" if isinstance(value, str) and not _is_number(value) else "right" for value in self._widest()]
        return tabulate(self.rows, headers="keys", tablefmt=tablefmt, colalign=numbers, disable_numparse=True)

    def _widest(self) -> list[str]:
        """The longest text of each column."""
        return [max((row[key] for row in self.rows), key=len) for key in self.rows[0]]


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit()


def size(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, str]:
    """Parameters and MACs of a step of a network for an input of `shape`, from shapes alone."""
    with torch.device("meta"):
        model = build()
    report = estimate(model, torch.empty(shape, device="meta"))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": f"{parameters:,}", "MACs a step": _millions(report.flops)}


def _millions(macs: float) -> str:
    return f"{macs / 1e9:.3f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"


def results(folders: Sequence[Path]) -> list[dict]:
    """The newest test.json of each run folder in or below `folders`; what cannot stand in a table is named."""
    newest, seen = {}, set()
    for path in sorted(path for folder in folders for path in folder.rglob("*.test.json")):
        try:
            text = path.read_text()
            result = json.loads(text)
            is_result = _is_result(result)
        except (ValueError, RecursionError, OSError):
            is_result = False
        if not is_result:
            logger.warning(f"{path}: left out, it is not what test.py writes")
        elif result["count"] != (complete := TEST_SAMPLES.get(result["dataset"])):
            whole = f"of {result['count']} samples and not {complete}" if complete else "of a data set without recipe"
            logger.warning(f"{path}: left out, it is {whole}")
        elif text not in seen and (path.parent not in newest or result["time"] > newest[path.parent]["time"]):
            newest[path.parent] = result | {"path": path}
            seen.add(text)
    return list(newest.values())


def _is_result(content: object) -> bool:
    try:
        percent, energy = float(content["top1"]), content.get("energy", {"energy_mj": 0})
        texts = [content[key] for key in ("time", "dataset", "model")]
        return (
            0 <= percent <= 100
            and 0 <= float(energy["energy_mj"]) < math.inf
            and all(isinstance(text, str) for text in texts)
            and not isinstance(content["top1"], str)
        )
    except (TypeError, KeyError, AttributeError):
        return False


def measured(cfg: Config, found: Sequence[dict]) -> dict[str, str]:
    """Accuracy and energy of the results with the network, data and input of `cfg`, trained as it says."""
    wanted, mine = plain(cfg), []
    for result in found:
        if all(result.get(key) == wanted[key] for key in ("dataset", "input_size", "split_seed", *MODEL_FIELDS)):
            different = [key for key in TRAINING if result.get(key, FIELDS[key].default) != wanted[key]]
            if different:
                key = different[0]
                logger.warning(
                    f"{result['path']}: left out, its {key} is {result.get(key)}, the recipe's {wanted[key]}"
                )
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
    """A recipe's row; an ablation's beside its recipe's."""
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


def imagenet(found: Sequence[dict]) -> Table:
    """The recipes, and below them the paper's other networks."""
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
    return Table("imagenet", "ImageNet-1k", rows)


def others(found: Sequence[dict]) -> Table:
    """CIFAR, the event recordings and the digits."""
    folders = ("cifar10", "cifar100", "dvs128-gesture", "cifar10-dvs", "digits", "digits-dvs")
    found_recipes = [cfg for folder in folders for _, cfg in recipes(folder) if cfg.dataset in DATA_NAMES]
    return Table("small", "CIFAR, event recordings, digits", [row(cfg, found) for cfg in found_recipes])


def ablations(found: Sequence[dict]) -> Table:
    """Both data sets of the paper's ablations side by side."""
    rows = [{"attention, embedding": name, "--variant": variant or ""} for variant, name in ABLATIONS.items()]
    for path in (ROOT / "cifar100/cifar100.yml", ROOT / "cifar10-dvs/cifar10-dvs.yml"):
        recipes = {cfg.variant: cfg for cfg in read(path).all()}
        for texts, variant in zip(rows, ABLATIONS, strict=True):
            whole = row(recipes[variant], found)
            name = whole["data set"]
            kept = ("parameters", "MACs a step", "top-1 (%) *paper*", "top-1 (%) *here*")
            texts |= {f"{name}: {key}": whole[key] for key in kept}
    return Table("ablations", "Ablations", rows)


def run(argv: Sequence[str]) -> None:
    flags = parser(__doc__)
    flags.add_argument("--results", nargs="+", type=Path, help="folders of runs that test.py evaluated (output)")
    flags.add_argument("--output-dir", type=Path, default=Path("output/tables"), help="folder to write to")
    args = flags.parse_args(argv)
    setup_console(is_main=True)
    if absent := [str(folder) for folder in args.results or () if not folder.is_dir()]:
        raise UserError(f"--results {absent[0]}: there is no such folder")
    found = results(args.results or [Path("output")])
    tables = [imagenet(found), others(found), ablations(found)]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    markdown = "\n\n".join(f"### {table.title}\n\n{table.write('github')}" for table in tables)
    page = PAGE + "\n".join(f"<h2>{table.title}</h2>\n{table.write('html')}" for table in tables)
    (args.output_dir / "tables.md").write_text(markdown + "\n")
    (args.output_dir / "tables.html").write_text(re.sub(r"\*(\w+)\*", r"<em>\1</em>", page) + "\n</html>\n")
    for table in tables:
        plain = [{key.replace("*", ""): text for key, text in row.items()} for row in table.rows]
        write_csv(args.output_dir / f"{table.name}.csv", plain)
    logger.info(markdown)
    logger.info(f"\nwritten: tables.md, tables.html and {len(tables)} CSV files in {args.output_dir}")


if __name__ == "__main__":
    main(run)
