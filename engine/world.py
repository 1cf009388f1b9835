"""Ranks and devices: a thin layer over torch.distributed that does nothing in a single process."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as td
from torch.distributed.rendezvous import rendezvous

from .cli import RESUME, UserError
from .settings import Config


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `world_size`, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(device: str) -> World:
    """Join the process group that torchrun announced in the environment, if any: NCCL for GPUs, gloo for CPUs."""
    where, gpus = torch.device("cpu"), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" or (device == "auto" and gpus):
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= gpus:
            raise UserError(f"--device cuda: torch sees {gpus} CUDA devices; start fewer ranks, or use --device cpu")
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, where)
    try:
        store, rank, size = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # restarted ranks get the store with the addresses of the dead; on several nodes see docs/recipes.md
            store = td.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend, device_id = ("cpu:gloo,cuda:nccl", where) if where.type == "cuda" else ("gloo", None)
        td.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE: cannot join the other ranks ({error}); start with torchrun") from None
    return World(rank, size, where)


@contextlib.contextmanager
def membership() -> Iterator[None]:
    """Leave the process group, if there is one, at the end; raise `UserError` if another rank was lost."""
    try:
        yield
    except RuntimeError as error:
        signs = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
        reason = str(error).partition("\n")[0]
        if not td.is_initialized() or not any(sign in str(error).lower() for sign in signs):
            raise
        raise UserError(f"another rank: lost ({reason}), see its own message; {RESUME}") from None
    if td.is_initialized():
        # torch waits for gloo's threads without releasing the interpreter, which they need to free the last message
        time.sleep(0.2)
        td.destroy_process_group()


def set_arithmetic(cfg: Config) -> None:
    """Set how a GPU computes convolutions and float32."""
    torch.backends.cudnn.benchmark = cfg.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = cfg.tf32


def is_slow(amp: str | None, device: torch.device) -> bool:
    """Return True for fp16 on a CPU and bf16 on one without its instructions: up to 300 times slower than float32."""
    if device.type != "cpu" or amp != "bf16":
        return device.type == "cpu" and amp == "fp16"
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(amp: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context of a mixed precision, or of float32 where it is slow."""
    is_used = amp != "off" and not is_slow(amp, device)
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=is_used)


def in_turns(make: Callable):
    """Return `make()`, called in the main rank first, then in one rank of each machine, then in the others."""
    if not td.is_initialized():
        return make()
    patient = td.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    place = 0 if td.get_rank() == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2  # machines share disks
    for turn in range(3):
        if turn == place:
            result = make()
        td.barrier(patient)
    return result


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def largest(value: int) -> int:
    """Return the largest of all ranks' values; ranks meet over their CPUs, so that none waits for its GPU."""
    box = torch.tensor(value)
    if td.is_initialized():
        td.all_reduce(box, td.ReduceOp.MAX)
    return int(box)


def gather(values: list) -> list:
    """Return the lists of all ranks, concatenated from the main rank on, in every rank."""
    lists = [values] * world_size()
    if td.is_initialized():
        td.all_gather_object(lists, values)
    return [value for part in lists for value in part]
