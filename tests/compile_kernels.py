"""Compiles every kernel that a training step and an evaluation launch, for a GPU that need not be there.

    python tests/compile_kernels.py ARCHITECTURE NAME [BATCH SIZE T]

The networks run on the meta device, in half precision and at their true sizes; launches stop behind the compiler.
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


def launches(architecture, network, shape):
    """Every kernel that was compiled, once."""
    found = {}
    driver.set_active(Driver(architecture))
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[kernel.hash] = (self.fn.__qualname__, self.fn.__module__, kernel)

    jit.JITFunction.run = compile_only
    x = torch.empty(shape, dtype=torch.float16, device="meta")
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
    architecture, name, batch, size, steps = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    with torch.device("meta"):
        network = create_model(name, time_steps=steps, ssa_membrane="released", lif_backend="auto").half()
    for module in network.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"  # set_lif_backend asks for a device
    frames = (steps,) if network.in_channels == 2 else ()  # of events
    shape = (batch, *frames, network.in_channels, size, size)
    for function, module, kernel in launches(architecture, network, shape):
        print(module, function, resources(kernel), kernel.metadata.num_warps)
