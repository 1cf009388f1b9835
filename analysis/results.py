"""Results of test.py (NAME.test.json): selection, grouping by recipe, and means."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from engine.cli import UserError
from engine.config import FIELDS, LOCAL_FIELDS, MODEL_FIELDS, PUBLISHED, Config, plain
from engine.log import logger, read_record

# samples of the complete test sets; results on fewer do not count
TEST_SAMPLES = {"torch/cifar10": 10_000, "torch/cifar100": 10_000, "dvs128-gesture": 288, "cifar10-dvs": 1_000}
TEST_SAMPLES |= {"digits": 360, "digits-dvs": 360, "imagenet": 50_000, "cifar10-jpeg": 10_000}  # see `data_key`
# settings that affect the accuracy; seeds may differ, because results are means over seeds
_OTHERS = "variant accum_iter seed save_steps keep eval_batch_size eval_amp channels_last grad_checkpointing".split()
_OPEN = ("num_classes", "effective_batch")  # None fits every number
_TRAINING = [key for key in FIELDS if key not in (*LOCAL_FIELDS, *MODEL_FIELDS, *PUBLISHED, *_OTHERS)]
SETTINGS = ["dataset", *MODEL_FIELDS, *(key for key in _TRAINING if key != "dataset"), "finetune"]


def results(folders: Sequence[Path]) -> list[dict]:
    """Return the newest result of each run folder in or below `folders`, with its `path`; warn about others."""
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f"{missing[0]}: no such folder; pass folders of runs")
    for path in sorted(path for folder in folders for path in folder.rglob("metrics.jsonl")):
        if not any(path.parent.glob("*.test.json")):
            logger.warning(f"{path.parent}: left out, not evaluated; run test.py")
    newest, seen = {}, {}
    for path in sorted(path for folder in folders for path in folder.rglob("*.test.json")):
        if (result := read_result(path)) is None:
            logger.warning(f"{path}: left out, not a result of test.py")
        elif not _is_complete(result):
            logger.warning(f"{path}: left out, {result['count']} samples are not the test set of {result['dataset']}")
        elif (first := seen.setdefault(_identity(result), path)) != path:
            logger.warning(f"{path}: left out, a copy of {first}")
        else:
            newest.setdefault(path.parent, []).append(result | {"path": path})
    for group in newest.values():
        group.sort(key=lambda result: result["time"])
        for older in group[:-1]:
            logger.warning(f"{older['path']}: left out, {group[-1]['path'].name} is newer")
    return [group[-1] for group in newest.values()]


def _identity(result: dict) -> str:
    """Return what a copy shares with its original; `analysis.grid --record` shortens paths."""
    return json.dumps({key: value for key, value in result.items() if key not in (*LOCAL_FIELDS, "command")})


def _is_complete(result: dict, key: str = "") -> bool:
    is_imagenet = result["dataset"] == "imagefolder" and result.get("num_classes") == 1000
    key = key or ("imagenet" if is_imagenet else result["dataset"])
    return result["count"] == TEST_SAMPLES.get(key, result["count"])


def read_result(path: Path) -> dict | None:
    """Return the content of a file, with `finetune` of its run, or None if test.py did not write it."""
    try:
        content = json.loads(path.read_text())
        figures = [content["top1"] / 100, content.get("energy", {"energy_mj": 0})["energy_mj"]]
        texts = [content[key] for key in ("time", "dataset", "model")]
        is_result = figures[0] <= 1 and all(0 <= x < math.inf for x in figures) and isinstance(content["count"], int)
        start = read_record(path.with_name("run.json"), {}, lambda text: json.loads(text)[0]["config"])
        content["finetune"] = start.get("finetune")
        return content if is_result and all(isinstance(text, str) for text in texts) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        return None


def data_key(cfg: Config) -> str:
    """Return the name of a recipe's data set, for images and recordings in folders that of the folder."""
    return Path(cfg.data_path).name if cfg.dataset.endswith("folder") and cfg.data_path else cfg.dataset


def settings(result: dict) -> dict[str, object]:
    """Return the settings of a result that affect the accuracy."""
    return {key: result.get(key, FIELDS[key].default) for key in SETTINGS}


def differences(result: dict, wanted: dict) -> dict[str, tuple]:
    """Return the settings that affect the accuracy and differ: name -> (value of the result, wanted value)."""
    pairs = {key: (value, wanted[key]) for key, value in settings(result).items() if value != wanted[key]}
    return {key: pair for key, pair in pairs.items() if key not in _OPEN or None not in pair}


def by_recipe(rows: Sequence[dict], configs: Sequence[Config]) -> dict[Config, list[dict]]:
    """Group results by the recipe or variant that they follow; warn about results that follow none."""
    groups = {cfg: [] for cfg in configs}
    for result in rows:
        nearest = min(configs, key=lambda cfg: (cfg.dataset != result["dataset"], len(differences(result, plain(cfg)))))
        if different := differences(result, plain(nearest)):
            key, (value, recipe) = next(iter(different.items()))
            name = " ".join(filter(None, (Path(nearest.config).name, nearest.variant)))
            logger.warning(f"{result['path']}: left out, {key} is {value}, but {recipe} in the nearest recipe, {name}")
        elif not _is_complete(result, data_key(nearest)):
            logger.warning(f"{result['path']}: left out, {result['count']} images are not the recipe's test set")
        else:
            groups[nearest].append(result)
    return groups


def averages(group: Sequence[dict]) -> dict[str, str]:
    """Format the means of runs: accuracy with its standard deviation, seconds of training, energy and firing rate."""
    energies = [result["energy"] for result in group if "energy" in result]
    return {
        "top-1 (%)": mean([result["top1"] for result in group], ".2f", spread=True),
        "seconds": mean([seconds for result in group if (seconds := _seconds(result["path"]))], ".0f"),
        "energy (mJ)": mean([energy["energy_mj"] for energy in energies], ".3g"),
        "firing rate": mean([energy["firing_rate"] for energy in energies if energy.get("firing_rate")], ".4f"),
    }


def _seconds(path: Path) -> float:
    """Return the seconds of training from the metrics next to a result, or 0 without metrics."""
    metrics = path.with_name("metrics.jsonl")
    return sum(read_record(metrics, [], lambda text: [json.loads(line)["seconds"] for line in text.splitlines()]))


def verdict(values: Sequence[float], others: Sequence[float], expected: float | None) -> str:
    """Format the difference of two means with 2 standard errors; compare its sign with `expected` beyond them."""
    if not values or not others or not expected:
        return ""
    difference = statistics.mean(values) - statistics.mean(others)
    if min(len(values), len(others)) < 2:
        return f"{difference:+.2f}: undecided"
    error = 2 * math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in (values, others)))
    sign = "holds" if difference * expected > 0 else "reversed"
    return f"{difference:+.2f} ± {error:.2f}: {'undecided' if abs(difference) <= error else sign}"


def mean(values: Sequence[float], form: str, spread: bool = False, count: bool = False) -> str:
    """Format a mean, with `spread` its standard deviation, with `count` the number of runs; "" without values."""
    if len(values) < 2:
        return "".join(f"{value:{form}}" for value in values)
    deviation = f" ± {statistics.stdev(values):{form}}" if spread else ""
    return f"{statistics.mean(values):{form}}{deviation}" + (f" ({len(values)} runs)" if count else "")
