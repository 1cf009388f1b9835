"""CUDA graphs: the kernels of a step, captured once and then launched together, without Python in between."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """A function of CUDA tensors that a CUDA graph replays after a few calls.

    The first calls run on a side stream as they are: they choose algorithms and set up libraries, which a graph cannot
    capture. The next call is captured. From then on only its kernels run, on copies of the inputs.

    Each call changes tensors that outlive it, such as running statistics, as the function does. A replay overwrites
    gradients that were `None` at the capture, and adds to others; set none of them to `None` between calls.

    Args:
        step: the function. It must not wait for the device; all but its tensors is frozen at the capture.
        warmup: calls before the capture.
    """

    def __init__(self, step: Callable[..., Tensor], warmup: int = 3):
        self.step, self.warmup = step, warmup
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's result on inputs of the captured shapes, detached; the next call overwrites it."""
        if self.warmup:
            self.warmup -= 1
            return self._run(inputs)
        if self.graph is None:
            self._capture(inputs)
        for captured, value in zip(self.inputs, inputs, strict=True):
            captured.copy_(value)
        self.graph.replay()
        return self.output

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            output = self.step(*inputs).detach()
        current.wait_stream(self.stream)
        return output

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [value.clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # only this mode lets the threads of a loader allocate pinned memory meanwhile
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.output = self.step(*self.inputs).detach()
