"""Compiles every kernel that a training step and an evaluation launch, for a GPU that need not be there.

    python tests/compile_kernels.py ARCHITECTURE DTYPE NAME BATCH SIZE T

The networks run on the meta device, at their true sizes; launches stop behind the compiler.
Prints a line for each kernel: its name, how many bytes it spills, what it was launched with.
"""

import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from models import create_model


class Driver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launches(architecture, network, x):
    """Every kernel that was compiled, once."""
    found = {}
    driver.set_active(Driver(architecture))
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[kernel.hash] = (self.fn.__qualname__, self.fn.__module__, kernel)

    jit.JITFunction.run = compile_only
    network.train()
    network(x).sum().backward()
    with torch.no_grad():
        network.eval()(x)
    return found.values()


def resources(kernel):
    """What the assembler says of registers and of the stack, to which they spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        output = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return dict(item.split(":") for item in output.split() if item.startswith(("REG:", "STACK:")))


if __name__ == "__main__":
    architecture, dtype, name = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
    batch, size, steps = map(int, sys.argv[4:])
    with torch.device("meta"):
        network = create_model(name, time_steps=steps, ssa_membrane="released", lif_backend="auto").to(dtype)
    for module in network.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"  # set_lif_backend asks for a device
    frames = (steps,) if network.in_channels == 2 else ()  # of events
    x = torch.empty((batch, *frames, network.in_channels, size, size), dtype=dtype, device="meta")
    for function, module, kernel in launches(architecture, network, x):
        print(module, function, resources(kernel), kernel.metadata.num_warps)
