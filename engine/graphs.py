"""CUDA graph of a step: its kernels, captured once and then launched together."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """A function of CUDA tensors that a CUDA graph replays after a few calls.

    The first `warmup` calls run as they are, because a graph cannot capture the choice of algorithms. The next call is
    captured; `step` must not wait for the device then. Later calls run its kernels alone, on copies of the inputs.
    A replay overwrites gradients that were `None` at the capture, and adds to others; set none to `None` between calls.
    """

    def __init__(self, step: Callable[..., Tensor], warmup: int = 3):
        self.step, self.warmup = step, warmup
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's result on inputs of the captured shapes, detached; the next call overwrites it."""
        if self.warmup:
            self.warmup -= 1
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                output = self.step(*inputs).detach()
            current.wait_stream(self.stream)
            return output
        if self.graph is None:
            self.inputs, self.graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
            # only this mode lets the threads of a loader allocate pinned memory meanwhile
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.output = self.step(*self.inputs).detach()
        for captured, value in zip(self.inputs, inputs, strict=True):
            captured.copy_(value)
        self.graph.replay()
        return self.output
