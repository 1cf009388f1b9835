"""CUDA graphs: the kernels of a step recorded once, then launched all together, without Python in between."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """A function of tensors on a CUDA device that a CUDA graph replays once it has been called a few times.

    The first calls run it as it is, on a stream of their own: they choose algorithms and set up libraries, which cannot
    be captured. The next call captures it, and from then on only its kernels run, on copies of the inputs.

    Every call does what the function does to tensors that outlive it, such as running statistics. Gradients that are
    `None` when a backward pass is captured are written anew by every replay, others are added to where they lie; so
    nothing may set them to `None` between two calls.

    Args:
        step: the function. It must not wait for the device, and everything but its tensors is frozen when captured.
        warmup: calls before the capture.
    """

    def __init__(self, step: Callable[..., Tensor], warmup: int = 3):
        self.step, self.warmup = step, warmup
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, detached; the next call overwrites it.

        Raises:
            ValueError: an input has another shape than when the function was captured.
        """
        if self.warmup:
            self.warmup -= 1
            return self._run(inputs)
        if self.graph is None:
            self._capture(inputs)
        for ours, value in zip(self.inputs, inputs, strict=True):
            if ours.shape != value.shape:
                raise ValueError(f"a CUDA graph captured for {tuple(ours.shape)} cannot take {tuple(value.shape)}")
            ours.copy_(value)
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
        # the threads of a loader may allocate pinned memory meanwhile, which only this mode permits
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.output = self.step(*self.inputs).detach()
