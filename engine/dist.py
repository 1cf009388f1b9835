"""One process or many: a thin layer over torch.distributed that does nothing where there is one process."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as td

from .errors import UserError


@dataclass(frozen=True)
class Dist:
    """This process among all: `rank` of `world_size`, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(device: str) -> Dist:
    """Join the process group that a launcher announced in the environment (RANK, WORLD_SIZE, LOCAL_RANK), if any.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where torch sees it. NCCL connects GPUs, gloo CPUs.

    Raises:
        UserError: CUDA is asked for and there is none, there are fewer devices than processes on this node, or
            the environment is not a launcher's.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    try:
        local_rank, world_size = (
            int(os.environ.get(key, default)) for key, default in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
    except ValueError:
        raise UserError("LOCAL_RANK and WORLD_SIZE in the environment must be numbers; start with torchrun") from None
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"process {local_rank} of this node has no GPU: start {gpus} processes")
        torch.cuda.set_device(local_rank)
    where = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if world_size == 1:
        return Dist(0, 1, where)
    try:
        td.init_process_group("nccl" if device == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes, start with torchrun: {error}") from None
    return Dist(td.get_rank(), td.get_world_size(), where)


def teardown() -> None:
    """Leave the process group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return td.get_world_size() if td.is_initialized() else 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of every process's `values` (in place)."""
    if td.is_initialized():
        td.all_reduce(values)
    return values


def from_main(value):
    """The main process's `value`, in every process."""
    if td.is_initialized():
        box = [value]
        td.broadcast_object_list(box)
        value = box[0]
    return value
