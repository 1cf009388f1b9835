"""How long a step takes: the fused networks of this project beside the same unfused and compiled, and spikingjelly 2.

Training steps (forward, loss, backward, AdamW) and evaluation, on noise of the shape of a recipe's data. The sides take
turns in every round, from the same weights; a ratio is the baseline's time over that of a side in the same round, and
its median is what counts. A side that cannot run is named with its reason.

    unfused-cupy          operation by operation, neurons of spikingjelly's CuPy kernels: the baseline on CUDA
    unfused-torch         operation by operation in torch: the baseline on a CPU
    unfused-compiled      that under torch.compile, only if --sides names it because it compiles for minutes; neurons
                          whose membrane leaks over the batch are left out of it, a loop of T*B steps
    spikingjelly2         qkformer_10_384 of spikingjelly 2.0.0 under plain autocast, in a process of its own
    spikingjelly2-policy  that under its precision policy
    ours                  lif_backend triton; on a CPU auto
    ours-graphs, ours-packed, ours-checkpointing
                          that with the whole training step in a CUDA graph, with packed spikes, with checkpointing
    ours-columns, ours-rows64, ours-gemm
                          that with other divisions of the work, only if --sides names them: neighbouring programs on
                          the columns of the same rows; 1x1 convolutions in evaluation with 64 rows a program instead of
                          128, or by cuBLAS with the neurons in a kernel of their own

Every round writes the figures so far to speed-DATE-DEVICE.json; the end adds a picture. After an interruption run the
same command again. It skips sides that the file has in all rounds, of the same commit, device and arguments. It
measures the missing sides together with the baseline and ours, because ratios compare sides of one run.
Another --output, or a change that is not committed, starts from scratch.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn

from analysis.common import main, parser, positive
from engine.cli import UserError
from engine.config import load

from . import roofline
from .common import (
    RESULTS,
    ROOT,
    STEPS,
    Turns,
    choose,
    eval_step,
    machine,
    network,
    random_batch,
    reason,
    release,
    result_path,
    runs_in,
    save_picture,
    write,
)
from .sides import ON_REQUEST, Case, all_sides

CONFIGURATIONS = {  # model -> recipe, batch size
    "qkformer_10_384": ("imagenet/qkformer_10_384.yml", 128),
    "qkformer_10_768": ("imagenet/qkformer_10_768.yml", 64),
    "qkformer_4_384": ("cifar10/cifar10.yml", 64),
    "qkformer_2_256": ("cifar10-dvs/cifar10-dvs.yml", 16),
    "qkformer_3_64": ("digits/digits.yml", 16),
    "qkformer_2_64": ("digits-dvs/digits-dvs.yml", 16),
}
PUBLISHED = list(CONFIGURATIONS)[:4]  # measured where nothing else is asked for
# arguments that figures depend on
DECISIVE = ("rounds", "steps", "batch_size", "input_size", "time_steps", "ssa_membrane", "amp", "spikingjelly2")
PACKAGES = ("torch", "triton", "cupy-cuda13x", "spikingjelly", "timm", "numpy")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}  # of convolutions and activations
CHECKED = {"cpu": 2, "cuda": 16}  # samples whose logits are compared before anything is timed
AGREEMENT = 0.5  # of the baseline's classes that ours must share there: rounding flips spikes, so some may differ
NOTES = {
    "spikingjelly2": "not the released network: other biases, half of its neurons do not detach the reset, one "
    "convolution for q, k and v, no leak over the batch; and weights of its own",
    "spikingjelly2-policy": "the same network, neurons stored in half precision and run on Triton",
}


def weights(case: Case) -> dict:
    """The weights that every side starts from, with running statistics of a batch: without, hardly a neuron fires."""
    model = network(case.cfg, lif_backend="auto").to(case.device).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model(random_batch(case.at(CHECKED[case.device.type]), case.device)[0])
    return {key: value.cpu() for key, value in model.state_dict().items()}


def compare(case: Case, state: Mapping) -> dict:
    """How far ours is from the baseline, in float32: largest difference over the range of the logits, and top-1.

    Raises:
        UserError: they agree so little that there is nothing to time.
    """
    sides = all_sides(case.model, "eval", case.device)
    batch, logits = random_batch(case.at(CHECKED[case.device.type]), case.device), []
    for name in (next(iter(sides)), "ours"):
        try:
            model = network(case.cfg, lif_backend=sides[name].lif_backend)
            model.load_state_dict(state)
            logits.append(eval_step(model.to(case.device), "off", case.device)(*batch).double())
        except Exception as error:  # timing meets it again, and tells
            return {"not_run": f"{name}: {reason(error)}"}
    reference, ours = logits
    deviation = ((ours - reference).abs().max() / (reference.max() - reference.min())).item()
    agreement = (ours.argmax(1) == reference.argmax(1)).double().mean().item()
    if not agreement >= AGREEMENT:
        raise UserError(
            f"{case.model}: in float32 ours shares {agreement:.0%} of the baseline's classes: mend that before timing"
        )
    return {"samples": len(ours), "deviation": deviation, "same_class": agreement}


def complete(runs: Sequence[dict], report: dict) -> list[dict]:
    """Results of earlier runs that count in this one: of its commit, device and arguments, with all rounds."""
    if report["git_commit"].endswith("+changes"):
        return []

    def key(run: dict) -> list:
        return [run["git_commit"], run["device"], *(str(run["arguments"].get(name)) for name in DECISIVE)]

    def is_complete(result: dict) -> bool:
        baseline = result["sides"][result["baseline"]]
        return "ms" in baseline and len(baseline["ms"]["rounds"]) == report["arguments"]["rounds"]

    return [result for run in runs if key(run) == key(report) for result in run["results"] if is_complete(result)]


def missing(case: Case, mode: str, asked: Sequence[str] | None, results: Sequence[dict]) -> list[str]:
    """Return the sides to measure: those that `results` lack, with the baseline and ours; none if they lack nothing."""
    baseline, *others = all_sides(case.model, mode, case.device)
    names = [baseline, *(name for name in others if (name in asked if asked else name not in ON_REQUEST))]
    known = {name for result in results if is_of(result, case, mode) for name in result["sides"]}
    is_done = known.issuperset(names)
    skipped = [name for name in names if name in known and (is_done or name not in (baseline, "ours"))]
    if skipped:
        print(f"{case.model} {mode}: skips {', '.join(skipped)}, which the file has", flush=True)
    return [name for name in names if name not in skipped]


def is_of(result: dict, case: Case, mode: str) -> bool:
    """Whether a result is of this network and mode."""
    return (result["model"], result["mode"]) == (case.model, mode)


def measure(case: Case, mode: str, names: Sequence[str], state: Mapping, args: argparse.Namespace) -> Iterator[dict]:
    """Time the sides `names`, the baseline first, in turns; yield after each round what there is so far.

    That is the times of each side, or why it did not run.
    """
    sides = all_sides(case.model, mode, case.device)
    with Turns(f"{case.model} {mode}", case.device) as turns:
        for name in names:
            turns.start(name, functools.partial(sides[name].start, case, mode, state, args.spikingjelly2))
        for _ in range(args.rounds):
            turns.round(args.steps)
            yield {"baseline": names[0], "sides": turns.figures(names, names[0], case.cfg.batch_size)}
    torch.compiler.reset()


def with_floor(result: dict, case: Case, mode: str, rates: roofline.Rates) -> dict:
    """The result with the least time a step could take on this device, and how many times that each side takes."""
    need = roofline.demand(case.cfg, mode)
    size = DTYPES[case.amp].itemsize
    floor = rates.floor_ms(need, case.cfg.batch_size, size)
    for figures in result["sides"].values():
        if "ms" in figures:
            figures["times_floor"] = figures["ms"]["median"] / floor
    per_sample = {"operations": need.operations, "bytes": need.elements * size}
    return result | {"floor_ms": floor, "per_sample": per_sample}


def about(case: Case, mode: str) -> dict:
    """What was measured."""
    keys = ("time_steps", "input_size", "batch_size", "num_classes", "ssa_membrane")
    return {"model": case.model, "mode": mode, "amp": case.amp} | {key: getattr(case.cfg, key) for key in keys}


def table(result: dict) -> str:
    """The figures of a case, for people."""
    rows, notes = [], []
    for name, figures in result["sides"].items():
        if "not_run" in figures:
            notes.append(f"{name} did not run: {figures['not_run']}")
            continue
        if name in NOTES:
            notes.append(f"{name}: {NOTES[name]}")
        ms, ratio, peak = figures["ms"], figures["ratio"], figures["peak_bytes"]
        rows.append(
            [
                name,
                "{min:.2f} {median:.2f} {max:.2f}".format(**ms),
                f"{figures['samples_per_s']:.1f}",
                "" if peak is None else f"{peak / 1e9:.2f}",
                "" if ratio is None else "{min:.2f} {median:.2f} {max:.2f}".format(**ratio),
                f"{figures['times_floor']:.2f}",
            ]
        )
    headers = ["side", "ms: min median max", "samples/s", "peak GB", "ratio: min median max", "x floor"]
    title = (
        "{model} {mode}: T = {time_steps}, input {input_size}, batch {batch_size}, amp {amp}, "
        "ssa_membrane {ssa_membrane}; floor {floor_ms:.3f} ms".format(**result)
    )
    return "\n".join([title, tabulate(rows, headers, disable_numparse=True), *notes])


def draw(runs: Sequence[dict]) -> Figure:
    """The ratio of each side to the baseline, for every case and mode; of what was measured twice, the last."""
    found = {}
    for result in (result for run in runs for result in run["results"]):
        title = "{model} {mode}\nT {time_steps}, {input_size} px, batch {batch_size}".format(**result)
        ratios = {name: figures.get("ratio") for name, figures in result["sides"].items()}
        found.setdefault(title, {}).update({name: ratio for name, ratio in ratios.items() if ratio})
    figure = Figure(figsize=(max(6, 3.2 * len(found)), 4.5), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(name for ratios in found.values() for name in ratios))
    for i, name in enumerate(names):
        at = [x for x, ratios in enumerate(found.values()) if name in ratios]
        values = [ratios[name] for ratios in found.values() if name in ratios]
        heights = [value["median"] for value in values]
        whiskers = [[v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values]]
        places = [x + (i - (len(names) - 1) / 2) * 0.8 / len(names) for x in at]
        bars = axis.bar(places, heights, 0.8 / len(names), yerr=whiskers, capsize=2, label=name, color=f"C{i}")
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set_xticks(range(len(found)), list(found), fontsize=8)
    axis.set_ylabel("times as fast as the baseline (min, median, max)")
    axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    where = runs[-1]["device"]
    figure.suptitle(where.get("gpu", f"{where['cpu']}, {where['cores']} cores"), fontsize=10)
    axis.grid(axis="y", alpha=0.25)
    return figure


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The recipes that are measured, changed as the flags say; raises `UserError` for values out of range."""
    found = []
    changes = ("time_steps", "input_size", "batch_size", "ssa_membrane")
    changed = {key: getattr(args, key) for key in changes if getattr(args, key) is not None}
    for model in args.models:
        recipe, batch_size = ROOT / CONFIGURATIONS[model][0], CONFIGURATIONS[model][1]
        values = {"batch_size": batch_size} | changed
        flags = tuple(text for key, value in values.items() for text in (f"--{key}", str(value)))
        found.append(Case(model, recipe, flags, load(recipe, flags), args.amp, device))
    return found


def run(argv: Sequence[str]) -> None:
    ours = parser(__doc__)
    ours.add_argument("--models", nargs="+", choices=CONFIGURATIONS, default=PUBLISHED, help="(the four published)")
    ours.add_argument("--modes", nargs="+", choices=STEPS, default=list(STEPS), help="(both)")
    cuda = torch.device("cuda")
    sides = [side for mode in STEPS for side in list(all_sides("qkformer_10_384", mode, cuda))[1:]]
    sides = list(dict.fromkeys(sides))
    ours.add_argument(
        "--sides", nargs="+", choices=sides, help=f"next to the baseline (all but {', '.join(ON_REQUEST)})"
    )
    ours.add_argument("--rounds", type=positive, default=5, help="in each of which every side has its turn (5)")
    ours.add_argument("--steps", type=positive, default=5, help="timed in a turn (5)")
    ours.add_argument("--batch-size", type=positive, help="(128 and 64 for ImageNet, 64 for CIFAR, 16)")
    ours.add_argument("--input-size", type=positive, help="height and width (the recipe's)")
    ours.add_argument("--time-steps", type=positive, help="T (the recipe's)")
    ours.add_argument("--ssa-membrane", choices=("per_sample", "released"), help="(the recipe's)")
    ours.add_argument("--amp", choices=DTYPES, default="fp16", help="(fp16; off on a CPU, where that is what it means)")
    ours.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    ours.add_argument("--spikingjelly2", type=Path, metavar="FOLDER", help="see benchmarks/spikingjelly2.py")
    ours.add_argument("--output", type=Path, default=RESULTS, help=f"folder to write to, and to go on from ({RESULTS})")
    args = ours.parse_args(argv)
    device = choose(args.device)
    if device.type == "cpu" and args.amp == "fp16":
        args.amp = "off"  # as in training
    chosen = cases(args, device)
    here = machine("speed", PACKAGES, device)
    path = result_path(args.output, "speed", here["device"])
    earlier = runs_in(path)
    rates = roofline.measure(device, DTYPES[args.amp])
    print(f"{rates.bytes_per_s / 1e9:.0f} GB/s copied, {rates.operations_per_s / 1e12:.2f} TFLOP/s", flush=True)
    report = here | {"arguments": vars(args), "rates": rates._asdict(), "results": []}
    results = complete(earlier, report)
    results = [result for result in results if any(is_of(result, case, mode) for case in chosen for mode in args.modes)]
    for case in chosen:
        wanted = {mode: names for mode in args.modes if (names := missing(case, mode, args.sides, results))}
        if not wanted:
            continue
        state = weights(case)
        agreement = compare(case, state)
        release(device)
        print(f"{case.model}: ours beside the baseline in float32: {agreement}", flush=True)
        for mode, names in wanted.items():
            measured = report["results"]
            for figures in measure(case, mode, names, state, args):
                result = with_floor(about(case, mode) | {"agreement": agreement} | figures, case, mode, rates)
                report["results"] = [*measured, result]
                write(path, {"runs": [*earlier, report]})  # whatever becomes of the rest
    results += report["results"]
    save_picture(draw(runs_in(path)), path)
    print(*("\n" + table(result) for result in results), sep="\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main(run)
