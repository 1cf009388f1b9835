"""What this project aims at on an H200, and whether figures of `benchmarks.speed` are there."""

from collections.abc import Sequence
from typing import NamedTuple

from .common import spread
from .sides import BASELINE, COMPILED


class Gate(NamedTuple):
    """What this project aims at on an H200 in half precision: by how much a side is better than another.

    `what` "time" is how many times faster, at least; "memory" the fraction of its peak memory, at most.
    """

    model: str
    mode: str
    what: str
    side: str
    versus: str
    bound: float
    aim: float | None = None


# model: at least how many times faster than the baseline, and aimed at, in training and in evaluation
FASTER = {
    "qkformer_10_384": {"train": (2.0, 3.0), "eval": (2.8, 4.5)},
    "qkformer_10_768": {"train": (1.6, 2.0), "eval": (2.2, 2.8)},
    "qkformer_4_384": {"train": (2.5, 3.5)},
    "qkformer_2_256": {"train": (2.5, 3.5)},
}
GATES = [
    *(
        Gate(model, mode, "time", side, BASELINE, *bounds)
        for model, modes in FASTER.items()
        for mode, bounds in modes.items()
        for side in (("ours", "ours-graphs") if mode == "train" else ("ours",))
    ),
    *(
        Gate(model, *gate)
        for model in FASTER
        for gate in (
            ("train", "time", "ours", COMPILED, 1.15),
            ("eval", "time", "ours", COMPILED, 1.3),
            ("train", "time", "ours-checkpointing", "ours", 1 / 1.4),
            ("train", "memory", "ours", BASELINE, 0.40),
            ("train", "memory", "ours-packed", BASELINE, 0.22),
            ("train", "memory", "ours-checkpointing", BASELINE, 0.12),
        )
    ),
    Gate("qkformer_10_384", "train", "time", "ours", "spikingjelly2", 3.0),
    Gate("qkformer_10_384", "train", "time", "ours", "spikingjelly2-policy", 1.4),
]


def verdicts(results: Sequence[dict]) -> list[list[str]]:
    """A row for each gate of what was measured: what is asked for, what there is, and whether that is enough.

    Both sides of a gate are of one result, the last that has them.
    """
    rows = []
    for gate in GATES:
        found = [result["sides"] for result in results if (result["model"], result["mode"]) == (gate.model, gate.mode)]
        if not found:
            continue
        pairs = [(sides.get(gate.side, {}), sides.get(gate.versus, {})) for sides in found]
        side, versus = next((pair for pair in reversed(pairs) if "ms" in pair[0] and "ms" in pair[1]), ({}, {}))
        if not side:
            value, verdict = "", "not measured"
        elif gate.what == "time":
            number = spread(v / s for v, s in zip(versus["ms"]["rounds"], side["ms"]["rounds"], strict=True))["median"]
            value, verdict = f"{number:.2f}", "met" if number >= gate.bound else "missed"
        else:
            number = side["peak_bytes"] / versus["peak_bytes"]
            value, verdict = f"{number:.3f}", "met" if number <= gate.bound else "missed"
        sign = "<=" if gate.what == "memory" else ">="
        asked = f"{sign} {gate.bound:.2f}" + (f" (aim {gate.aim})" if gate.aim else "")
        rows.append([gate.model, gate.mode, gate.what, f"{gate.side} : {gate.versus}", asked, value, verdict])
    return rows
