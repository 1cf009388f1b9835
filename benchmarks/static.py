"""Figures of the compiled kernels, without a GPU: registers, spills, instructions and memory accesses.

The networks of the recipes run a training step and an evaluation on the meta device, at the sizes of
`benchmarks.speed`; every Triton launch stops after the compiler. For one network and two kernels:

    python -m benchmarks.static --models qkformer_4_384 --kernels bn_lif pool

A row of the table is a kernel with its optional arguments and switches:

    launches      per training step or evaluation
    registers     per thread, the largest of all compiled variants; warps: how many a multiprocessor can hold then
    spill         bytes that a thread keeps outside registers
    instructions  per element, in the innermost loop with loads, over time or tiles (else in the whole kernel). Elements
                  are those of the current, the pooled map (forward), the map before pooling (backward), or the query.
                  Loops over few tiles count as long ones, because the compiler unrolls them
    once          instructions of a thread before and after that loop
    accesses      loads (L) and stores (S) of global memory in the loop, in the order of the machine code
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

from analysis.common import main, parser
from engine.config import Config
from models import LIF
from models.backends import BACKENDS

from .common import CONFIGURATIONS, PUBLISHED, network, random_batch, recipe

KERNELS = ("bn_lif", "bn_stats", "linear_lif", "pool", "self_attention", "token_attention")
WARPS, REGISTERS, SHARED = 64, 65536, 233472  # of a multiprocessor of sm_90
TILE = ("BR", "BC", "BN", "BD", "BH")  # constexprs whose product is the elements of a tile
OPTIONAL = ("add", "starts", "index", "total", "partial", "grad")  # arguments of kernels that may be None
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Launch(NamedTuple):
    """Launch that stopped after the compiler."""

    kernel: CompiledKernel
    looped: CompiledKernel  # with many tiles, if the compiler unrolls few
    name: str  # file, function and the switches that are on
    elements: int  # of a thread in one pass of its innermost loop


def launch_of(function: jit.JITFunction, kernel: CompiledKernel, looped: CompiledKernel, arguments: dict) -> Launch:
    """Name a launch and count its elements."""
    steps = arguments.get("T", 1)
    chunk = min(steps, arguments.get("CHUNK", steps))
    switches = [key for key in OPTIONAL if arguments.get(key) is not None]
    switches += [key.lower() for key, value in arguments.items() if value is True] + ["long"] * (steps > chunk)
    elements = chunk * math.prod(arguments.get(key, 1) for key in TILE)
    name = " ".join([module_of(function), function.fn.__name__.strip("_").removesuffix("_kernel"), *switches])
    elements *= 4 if name.startswith("pool backward") else 1  # its tiles consist of 2x2 blocks
    return Launch(kernel, looped, name, max(1, elements // (32 * kernel.metadata.num_warps)))


def module_of(function: jit.JITFunction) -> str:
    """Return the file of a kernel, without folder and suffix."""
    return function.fn.__module__.split(".")[-1]


def steps_of(cfg: Config, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return a training step and an evaluation of a recipe's network on the meta device, with the Triton kernels."""
    meta = torch.device("meta")
    with meta:
        model = network(cfg, lif_backend="auto").to(dtype)
    x = random_batch(cfg, meta)[0].to(dtype)
    for module in model.modules():
        if isinstance(module, LIF):
            module.function = BACKENDS["triton"]  # set_lif_backend needs a device
    return {"train": lambda: model.train()(x).mean().backward(), "eval": torch.no_grad()(lambda: model.eval()(x))}


def compiled(step: Callable[[], object], architecture: int, kernels: Sequence[str] = KERNELS) -> list[Launch]:
    """Compile every launch of `kernels` in a step."""
    target = GPUTarget("cuda", architecture, 32)
    zero = lambda *_: 0  # noqa: E731
    device = SimpleNamespace(get_current_target=lambda: target, get_current_device=zero, get_current_stream=zero)
    driver.set_active(device)  # all of a driver that the compiler needs
    run, launches = jit.JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        if module_of(self) in kernels:
            arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
            kernel = looped = run(self, grid=grid, warmup=True, **arguments)
            if "TILES" in arguments and not instructions(kernel)[1]:
                looped = run(self, grid=grid, warmup=True, **arguments | {"TILES": 16})
            launches.append(launch_of(self, kernel, looped, arguments))

    with mock.patch.object(jit.JITFunction, "run", compile_only):
        step()
    return launches


def resources(kernel: CompiledKernel) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{key}:(\d+)", output)[1]) for key in ("REG", "STACK"))


def instructions(kernel: CompiledKernel) -> tuple[list[str], list[str]]:
    """Return all instructions, and those of the longest innermost loop that loads from memory."""
    lines = [
        line.split("\t")[-1] for line in kernel.asm["sass"].splitlines() if line and not line.startswith("Function")
    ]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for end, line in enumerate(lines):
        if (target := re.search(r"BRA\S* .*?(LBB\d+)", line)) and labels.get(target[1], end) < end:
            body = lines[labels[target[1]] : end]
            if any("LDG" in step for step in body) and not any(start >= labels[target[1]] for start, _ in loops):
                loops.append((labels[target[1]], body))
    loop = max((body for _, body in loops), key=len, default=[])
    return tuple([line for line in part if not line.endswith(":") and line[:3] != "NOP"] for part in (lines, loop))


def accesses(instructions: Iterable[str]) -> str:
    """Format loads and stores of global memory in their order, as in "L8 S4"."""
    order = [access[1][0] for line in instructions if (access := re.search(r"\b(LDG|STG)\b", line))]
    runs = re.findall(r"((.)\2*)", "".join(order))
    return " ".join(f"{kind}{len(run)}" for run, kind in runs)


def figures(launches: Sequence[Launch]) -> list[dict]:
    """Return a row per name: its variants' largest figures, and the accesses of the variant with most instructions."""
    variants = {launch.kernel.hash: launch for launch in launches}
    rows = {}
    for launch in variants.values():
        registers, spill = resources(launch.kernel)
        whole, loop = instructions(launch.looped)
        body = loop or whole
        row = rows.setdefault(launch.name, {"kernel": launch.name, "launches": 0, "registers": 0, "warps": WARPS})
        row["registers"] = max(row["registers"], registers)
        row["warps"] = min(row["warps"], resident_warps(launch.kernel, registers))
        row["spill"] = max(row.get("spill", 0), spill)
        row["shared"] = max(row.get("shared", 0), launch.kernel.metadata.shared)
        if (each := len(body) / launch.elements) > row.get("instructions", 0):
            row |= {"instructions": each, "once": len(whole) - len(body), "accesses": accesses(body)}
    for launch in launches:
        rows[launch.name]["launches"] += 1
    return list(rows.values())


def resident_warps(kernel: CompiledKernel, registers: int) -> int:
    """Return the warps of this kernel that a multiprocessor holds, limited by registers and shared memory."""
    warps = kernel.metadata.num_warps
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // warps
    by_shared = SHARED // (kernel.metadata.shared + 1024)
    return min(WARPS // warps, by_registers, by_shared) * warps


def run(argv: Sequence[str]) -> None:
    flags = parser(__doc__)
    flags.add_argument("--models", nargs="+", choices=CONFIGURATIONS, default=PUBLISHED, help="(the four published)")
    flags.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="files of kernels (all)")
    flags.add_argument("--architecture", type=int, default=90, help="compute capability without its point (90)")
    flags.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"of the network ({DTYPES[0]})")
    args = flags.parse_args(argv)
    for model in args.models:
        cfg = recipe(model)
        for mode, step in steps_of(cfg, getattr(torch, args.dtype)).items():
            launches = compiled(step, args.architecture, args.kernels)
            print(f"\n{model} {mode}: batch {cfg.batch_size}, {args.dtype}, sm_{args.architecture}")
            print(tabulate(figures(launches), headers="keys", floatfmt=".1f"), flush=True)


if __name__ == "__main__":
    main(run)
