"""Sides of benchmarks.speed: this project's networks with every backend, and spikingjelly 2's."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from engine.config import Config
from engine.graphs import GraphedStep
from models import LIF
from models.backends import BACKENDS

from .common import network, random_batch
from .spikingjelly2 import Remote
from .turns import STEPS, Step, Timed

BASELINE, COMPILED = "unfused-cupy", "unfused-compiled"
SWITCHES = {  # side -> file and name of a constant of `models.fused`, its other value, and the modes that use it
    "ours-columns": ("kernels.launch", "COLUMNS_FIRST", True, ("train", "eval")),
    "ours-rows64": ("kernels.linear_lif", "ROWS", 64, ("eval",)),
    "ours-gemm": ("gpu", "ONE_KERNEL", False, ("eval",)),
}
ON_REQUEST = (COMPILED, *SWITCHES)  # sides that run only if --sides lists them


@dataclass(frozen=True)
class Case:
    """Recipe at the measured size."""

    model: str
    changes: dict[str, object]  # of its recipe
    cfg: Config
    amp: str
    device: torch.device


@dataclass(frozen=True)
class Side:
    """Network of this project: its `lif_backend`, and a preparation."""

    lif_backend: str
    prepare: Callable[[nn.Module], object] = lambda model: None
    graph: bool = False  # run the step in a CUDA graph
    switch: tuple[str, str, object] | None = None  # as in `SWITCHES`
    modes: tuple[str, ...] = tuple(STEPS)

    def start(self, case: Case, mode: str, state: Mapping, _) -> Timed:
        """Prepare a step with the weights `state`."""

        def make() -> Step:
            model = network(case.cfg, lif_backend=self.lif_backend)
            model.load_state_dict(state)
            self.prepare(model.to(case.device))
            step = STEPS[mode](model, case.amp, case.device)
            if self.switch:
                file, constant, value = self.switch
                step = mock.patch.object(importlib.import_module(f"models.fused.{file}"), constant, value)(step)
            return GraphedStep(step) if self.graph else step

        return Timed(make, random_batch(case.cfg, case.device), case.device)


@dataclass(frozen=True)
class Foreign:
    """spikingjelly 2's network, with or without its precision policy."""

    precision: bool
    modes: tuple[str, ...] = tuple(STEPS)

    def start(self, case: Case, mode: str, _, folder: Path | None) -> Remote:
        """Prepare a step in a separate process, with other weights."""
        settings = {"mode": mode, "amp": case.amp, "device": case.device.type, "precision": self.precision}
        return Remote(folder, {"model": case.model, "changes": case.changes, **settings})


def compiled(model: nn.Module) -> None:
    """Compile `model` without neurons that leak across the batch, whose loop of T*B steps is too long for a graph."""
    torch._dynamo.config.recompile_limit = 64  # blocks and units of different shapes
    for module in model.modules():
        if isinstance(module, LIF) and module.leak_across_batch:
            module.function = BACKENDS["auto"]
            module.forward = torch.compiler.disable(module.forward)
    model.compile(dynamic=False)


def all_sides(model: str, mode: str, device: torch.device) -> dict[str, Side | Foreign]:
    """Return the sides for a network on a device; the first is the baseline."""
    is_cuda, train = device.type == "cuda", ("train",)
    sides = {BASELINE: Side("cupy")} if is_cuda else {"unfused-torch": Side("torch")}
    sides |= {
        COMPILED: Side("torch", compiled),
        "spikingjelly2": Foreign(precision=False),
        "spikingjelly2-policy": Foreign(precision=True),
        "ours": Side("triton" if is_cuda else "auto"),
    }
    if is_cuda:
        for name, (*switch, modes) in SWITCHES.items():
            sides[name] = Side("triton", switch=tuple(switch), modes=modes)
        sides |= {
            "ours-packed": Side("triton", lambda model: model.set_spike_packing(True), modes=train),
            "ours-checkpointing": Side("triton", lambda model: model.set_grad_checkpointing(True), modes=train),
            "ours-graphs": Side("triton", graph=True, modes=train),  # last: a graph never releases its memory
        }
    has_foreign = model == "qkformer_10_384"
    return {
        name: side
        for name, side in sides.items()
        if mode in side.modes and (has_foreign or not isinstance(side, Foreign))
    }
