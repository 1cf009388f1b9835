"""Time of a step of this project's networks, fused, unfused and compiled, and of spikingjelly 2's.

Times training steps (forward, loss, backward, AdamW) and evaluation, on noise in the shape of a recipe's data. The
sides take turns in every round, from the same weights. A ratio is the baseline's time over that of a side in the same
round. The table lists sides that cannot run, with the reason.

    unfused-cupy          operation by operation, spikingjelly's CuPy kernels for neurons: the baseline on CUDA
    unfused-torch         operation by operation in torch: the baseline on a CPU
    unfused-compiled      unfused-torch under torch.compile, without neurons that leak across the batch
    spikingjelly2         qkformer_10_384 of spikingjelly 2.0.0 under plain autocast, in a separate process
    spikingjelly2-policy  spikingjelly2 with neurons in half precision on Triton, under its precision policy
    ours                  lif_backend triton; on a CPU auto
    ours-graphs, ours-packed, ours-checkpointing
                          the training step in a CUDA graph, with packed spikes, with checkpointing
    ours-columns          neighbouring programs of a kernel take the columns of the same rows
    ours-rows64           1x1 convolutions in evaluation with 64 rows a program instead of 128
    ours-gemm             1x1 convolutions in evaluation by cuBLAS, the neurons in a separate kernel

The last three and unfused-compiled, which compiles for minutes, run only if --sides lists them.

Every round writes its figures to speed-DATE-DEVICE.json. The same command resumes an interrupted benchmark, if commit,
device and arguments are the same and all changes are committed.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from analysis.common import main, parser, positive
from engine.cli import UserError

from . import roofline
from .common import CONFIGURATIONS, PUBLISHED, RESULTS, Results, choose, network, random_batch, recipe
from .sides import ON_REQUEST, Case, all_sides
from .turns import STEPS, Turns, eval_step, reason

CHANGES = ("time_steps", "input_size", "batch_size", "ssa_membrane")  # flags that change a recipe
DECISIVE = ("rounds", "steps", *CHANGES, "amp", "spikingjelly2")  # arguments that figures depend on
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}  # of convolutions and activations
CHECKED = {"cpu": 2, "cuda": 16}  # samples whose logits are compared before the timing
AGREEMENT = 0.5  # share of samples with the baseline's class; rounding flips spikes


def weights(case: Case) -> dict:
    """Return the weights of all sides, with running statistics of a batch, because few neurons spike without them."""
    model = network(case.cfg, lif_backend="auto").to(case.device).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model(random_batch(case.cfg, case.device, CHECKED[case.device.type])[0])
    return {key: value.cpu() for key, value in model.state_dict().items()}


def compare(case: Case, state: Mapping) -> dict:
    """Compare ours with the baseline in float32; raise `UserError` if too few classes are equal.

    `deviation` is the largest difference over the range of the logits.
    """
    sides = all_sides(case.model, "eval", case.device)
    batch, logits = random_batch(case.cfg, case.device, CHECKED[case.device.type]), []
    for name in (next(iter(sides)), "ours"):
        try:
            model = network(case.cfg, lif_backend=sides[name].lif_backend)
            model.load_state_dict(state)
            logits.append(eval_step(model.to(case.device), "off", case.device)(*batch).double())
        except Exception as error:  # the timing runs into it again and reports it
            return {"not_run": f"{name}: {reason(error)}"}
    reference, ours = logits
    deviation = ((ours - reference).abs().max() / (reference.max() - reference.min())).item()
    agreement = (ours.argmax(1) == reference.argmax(1)).double().mean().item()
    if not agreement >= AGREEMENT:
        raise UserError(f"{case.model}: ours has {agreement:.0%} of the baseline's classes in float32; fix ours first")
    return {"samples": len(ours), "deviation": deviation, "same_class": agreement}


def missing(case: Case, mode: str, asked: Sequence[str] | None, results: Sequence[dict]) -> list[str]:
    """Return the sides to measure, the baseline first; none if `results` have all of them."""
    baseline, *others = all_sides(case.model, mode, case.device)
    names = [baseline, *(name for name in others if (name in asked if asked else name not in ON_REQUEST))]
    known = {name for r in results if (r["model"], r["mode"]) == (case.model, mode) for name in r["sides"]}
    if known.issuperset(names):
        print(f"{case.model} {mode}: skipped, the file has {', '.join(names)}", flush=True)
        return []
    return names


def measure(case: Case, mode: str, names: Sequence[str], state: Mapping, args: argparse.Namespace) -> Iterator[dict]:
    """Time the sides `names`, the baseline first, in turns; yield the figures so far after each round."""
    sides = all_sides(case.model, mode, case.device)
    with Turns(f"{case.model} {mode}", case.device) as turns:
        for name in names:
            turns.start(name, functools.partial(sides[name].start, case, mode, state, args.spikingjelly2))
        for _ in range(args.rounds):
            turns.round(args.steps)
            yield {"baseline": names[0], "sides": turns.figures(names, names[0], case.cfg.batch_size)}
    torch.compiler.reset()


def report_of(case: Case, mode: str, agreement: dict, figures: dict, rates: roofline.Rates) -> dict:
    """Describe the case, and add the least time that a step takes on this device."""
    need, size = roofline.demand(case.cfg, mode), DTYPES[case.amp].itemsize
    floor = rates.floor_ms(need, case.cfg.batch_size, size)
    for side in figures["sides"].values():
        if "ms" in side:
            side["times_floor"] = side["ms"]["median"] / floor
    settings = {key: getattr(case.cfg, key) for key in (*CHANGES, "num_classes")}
    per_sample = {"operations": need.operations, "bytes": need.elements * size}
    result = {"model": case.model, "mode": mode, "amp": case.amp, **settings, "agreement": agreement, **figures}
    return result | {"floor_ms": floor, "per_sample": per_sample}


def table(result: dict) -> str:
    """Format the figures of a case."""
    rows, notes = [], []
    for name, figures in result["sides"].items():
        if "not_run" in figures:
            notes.append(f"{name} did not run: {figures['not_run']}")
            continue
        row = {"side": name, "ms": _three(figures["ms"]), "samples/s": f"{figures['samples_per_s']:.1f}"}
        row["peak GB"] = "" if figures["peak_bytes"] is None else f"{figures['peak_bytes'] / 1e9:.2f}"
        row["ratio"] = figures["ratio"] and _three(figures["ratio"])
        rows.append(row | {"x floor": f"{figures['times_floor']:.2f}"})
    title = (
        "{model} {mode}: T = {time_steps}, input {input_size}, batch {batch_size}, amp {amp}, "
        "ssa_membrane {ssa_membrane}; floor {floor_ms:.3f} ms; min median max of ms and ratio".format(**result)
    )
    return "\n".join([title, tabulate(rows, headers="keys", disable_numparse=True), *notes])


def _three(values: dict[str, float]) -> str:
    return "{min:.2f} {median:.2f} {max:.2f}".format(**values)


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """Return the recipes to measure, changed by the flags; raise `UserError` for values out of range."""
    changed = {key: getattr(args, key) for key in CHANGES if getattr(args, key) is not None}
    return [Case(model, changed, recipe(model, **changed), args.amp, device) for model in args.models]


def flags_of(doc: str, modes: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """Return the parser of benchmarks that time sides in turns."""
    flags = parser(doc)
    flags.add_argument("--modes", nargs="+", choices=modes, default=list(modes), help="modes to time (all)")
    flags.add_argument("--rounds", type=positive, default=rounds, help=f"turns of every side ({rounds})")
    flags.add_argument("--steps", type=positive, default=5, help="timed steps in a turn (5)")
    flags.add_argument("--amp", choices=DTYPES, default="fp16", help="precision (fp16; off on a CPU)")
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument("--output", type=Path, default=RESULTS, help=f"folder to write to, and to resume ({RESULTS})")
    return flags


def start(args: argparse.Namespace) -> torch.device:
    """Return the device of the flags; on a CPU turn fp16 off, as training does."""
    device = choose(args.device)
    if device.type == "cpu" and args.amp == "fp16":
        args.amp = "off"
    return device


def run(argv: Sequence[str]) -> None:
    flags = flags_of(__doc__, tuple(STEPS), rounds=5)
    flags.add_argument("--models", nargs="+", choices=CONFIGURATIONS, default=PUBLISHED, help="(the four published)")
    cuda = torch.device("cuda")
    sides = dict.fromkeys(name for mode in STEPS for name in list(all_sides("qkformer_10_384", mode, cuda))[1:])
    flags.add_argument("--sides", nargs="+", choices=sides, help=f"to compare (all but {', '.join(ON_REQUEST)})")
    flags.add_argument("--batch-size", type=positive, help="samples (128 and 64 for ImageNet, 64 for CIFAR, else 16)")
    flags.add_argument("--input-size", type=positive, help="height and width (the recipe's)")
    flags.add_argument("--time-steps", type=positive, help="T (the recipe's)")
    flags.add_argument("--ssa-membrane", choices=("per_sample", "released"), help="kind of membrane (the recipe's)")
    flags.add_argument("--spikingjelly2", type=Path, metavar="FOLDER", help="see benchmarks/spikingjelly2.py")
    args = flags.parse_args(argv)
    device = start(args)
    chosen, file = cases(args, device), Results("speed", args, device, DECISIVE)
    rates = roofline.measure(device, DTYPES[args.amp])
    print(f"{rates.bytes_per_s / 1e9:.0f} GB/s copied, {rates.operations_per_s / 1e12:.2f} TFLOP/s", flush=True)
    file.run["rates"] = rates._asdict()
    rounds = [len(result["sides"][result["baseline"]].get("ms", {}).get("rounds", [])) for result in file.kept]
    file.kept = [result for result, count in zip(file.kept, rounds, strict=True) if count == args.rounds]
    for case in chosen:
        wanted = {mode: names for mode in args.modes if (names := missing(case, mode, args.sides, file.all))}
        if not wanted:
            continue
        state = weights(case)
        agreement = compare(case, state)
        print(f"{case.model}: ours and the baseline in float32: {agreement}", flush=True)
        for mode, names in wanted.items():
            count = len(file.run["results"])
            for figures in measure(case, mode, names, state, args):
                del file.run["results"][count:]
                file.write([report_of(case, mode, agreement, figures, rates)])  # a killed run keeps its rounds
    asked = (r for r in file.all if r["model"] in args.models and r["mode"] in args.modes)
    print(*("\n" + table(result) for result in asked), f"\n{file.path}", sep="\n")


if __name__ == "__main__":
    main(run)
