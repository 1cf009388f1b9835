"""Optimizer and learning rate, which depends on the epoch alone, so resuming needs no state of the schedule."""

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn

from . import world
from .cli import UserError
from .config import Config


def effective_batch(cfg: Config) -> int:
    """Return the images per update, over all ranks and accumulated steps."""
    return cfg.batch_size * cfg.accum_iter * world.world_size()


def base_lr(cfg: Config) -> float:
    """Return the peak learning rate: `lr`, or `blr` per 256 images of effective batch."""
    return cfg.lr if cfg.lr is not None else cfg.blr * effective_batch(cfg) / 256


def total_epochs(cfg: Config) -> int:
    """Return the epochs of the schedule and of the cool-down after it."""
    return cfg.epochs + cfg.cooldown_epochs


def create_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return timm's optimizer `cfg.opt`, with a group for each depth of the network if `cfg.layer_decay` is below 1."""
    # torch's fused AdamW skips steps that overflow in fp16 without a synchronisation
    fused = {"fused": True} if cfg.opt == "adamw" and next(model.parameters()).is_cuda else {}
    try:
        return create_optimizer_v2(
            model,
            opt=cfg.opt,
            lr=base_lr(cfg),
            weight_decay=cfg.weight_decay,
            filter_bias_and_bn=not cfg.decay_1d,
            layer_decay=cfg.layer_decay if cfg.layer_decay < 1 else None,
            **fused,
        )
    except Exception as error:  # optimizers that miss a package or device raise errors of many kinds
        raise UserError(f"opt = {cfg.opt!r}: {error}; use adamw") from None


def lr_at(cfg: Config, epoch: float) -> float:
    """Return the learning rate at a (fractional) epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], base_lr(cfg))
    create_schedule(cfg, optimizer).step(epoch)
    return optimizer.param_groups[0]["lr"]


def create_schedule(cfg: Config, optimizer: torch.optim.Optimizer) -> Scheduler:
    """Return timm's schedule; `step` with a (fractional) epoch sets the rate of each group, times its `lr_scale`."""
    decay_epochs = cfg.epochs - (cfg.warmup_epochs if cfg.warmup_prefix else 0)
    return create_scheduler_v2(optimizer, **scheduler_kwargs(cfg) | {"num_epochs": decay_epochs})[0]
