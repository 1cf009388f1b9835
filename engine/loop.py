"""The one training loop, and evaluation, for every data set."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import timm.utils
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import dist as distributed
from .config import Config, mixes
from .data.loaders import Data
from .dist import Dist
from .errors import UserError
from .graphs import GraphedStep
from .log import RunLog, logger, progress
from .optim import lr_at, set_lr, total_epochs

NO_BEST = {"epoch": None, "test_top1": -1.0}
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer:
    """A network with all that its training carries from epoch to epoch; `state` and `restore` are what resumes it.

    The randomness of an epoch depends on the seed, the epoch and the rank alone, so none of it needs saving.
    """

    def __init__(self, cfg: Config, dist: Dist, model: nn.Module, optimizer: torch.optim.Optimizer, data: Data):
        self.cfg, self.dist, self.model, self.optimizer, self.data = cfg, dist, model, optimizer, data
        self.ema = ModelEmaV3(model, decay=cfg.ema_decay) if cfg.ema_decay is not None else None
        if cfg.compile:
            model.compile()
        self.parallel = model
        if dist.world_size > 1:
            ids = [dist.device] if dist.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(
                model, device_ids=ids, static_graph=True, broadcast_buffers=False
            )
        self.criterion = SoftTargetCrossEntropy() if mixes(cfg) else LabelSmoothingCrossEntropy(cfg.smoothing)
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=cfg.amp == "fp16" and dist.device.type == "cuda")
        self.step = GraphedStep(self._step) if cfg.cuda_graphs else self._step
        self.can_skip_sync = False
        self.epoch = 0  # epochs done
        self.best = dict(NO_BEST)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the average of the weights where there is one."""
        return self.ema.module if self.ema else self.model

    def state(self) -> dict:
        """Plain data from which `restore` goes on as if nothing had happened."""
        return {
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
        }

    def restore(self, state: dict) -> None:
        """Take up what `state` saved, but for the optimizer's settings, which are the configuration's."""
        self.model.load_state_dict(state["state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state.get("state_dict_ema") or state["state_dict"])
        groups = zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False)
        for saved, group in groups:  # before loading, for they decide on which device what is loaded lies
            saved.update({k: v for k, v in group.items() if k != "params"})
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best = state["epoch"], state["best"]

    def fit(self, log: RunLog | None, save: Callable[[bool], None]) -> None:
        """Train to the last epoch; after each, evaluate, record (`log` in the main process) and `save(is_best)`."""
        epochs = total_epochs(self.cfg)
        while self.epoch < epochs:
            start = time.monotonic()
            name = f"epoch {self.epoch + 1}/{epochs}"
            train_loss = self.train_epoch(name)
            if self.dist.world_size > 1:  # each process has its own running statistics; their mean is what is saved
                for model in [self.model, self.ema.module] if self.ema else [self.model]:
                    timm.utils.distribute_bn(model, self.dist.world_size, reduce=True)
            result = evaluate(self.cfg, self.dist, self.evaluated, self.data.test, f"{name} test")
            self._refuse_not_finite(result["loss"])
            is_best = result["top1"] > self.best["test_top1"]
            if is_best:
                self.best = {"epoch": self.epoch, "test_top1": result["top1"]}
            row = {
                "epoch": self.epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
                "train_loss": train_loss,
                **{f"test_{key}": result[key] for key in ("loss", "top1", "top5")},
                "seconds": round(time.monotonic() - start, 2),
            }
            if log:
                log.epoch(row)
            self.epoch += 1
            save(is_best)
            logger.info(
                f"{name}: lr {row['lr']:.2e}, train loss {train_loss:.4f}, test loss {row['test_loss']:.4f}, "
                f"top-1 {row['test_top1']:.2f} %, best {self.best['test_top1']:.2f} % "
                f"(epoch {self.best['epoch'] + 1}), {row['seconds']:.1f} s"
            )

    def train_epoch(self, name: str) -> float:
        """One pass over the training set; returns the mean loss over all processes."""
        cfg, device = self.cfg, self.dist.device
        seed = np.random.SeedSequence([cfg.seed, self.epoch, self.dist.rank]).generate_state(1)[0]
        timm.utils.random_seed(int(seed))
        loader, mixup = self.data.train, self.data.mixup
        order = loader.sampler if hasattr(loader.sampler, "set_epoch") else loader.dataset  # a stream orders itself
        if hasattr(order, "set_epoch"):
            order.set_epoch(self.epoch)
        if mixup:
            mixup.mixup_enabled = cfg.mixup_off_epoch is None or self.epoch < cfg.mixup_off_epoch
        self.parallel.train()
        steps, loss_sum, seen = len(loader), torch.zeros((), dtype=torch.float64, device=device), 0

        def status() -> dict:
            self._refuse_not_finite(loss_sum.item())
            return {"loss": f"{loss_sum.item() / seen:.4f}", "lr": f"{self.optimizer.param_groups[0]['lr']:.2e}"}

        for step, (images, labels) in enumerate(progress(loader, name, cfg.log_interval, self.dist.is_main, status)):
            first = step // cfg.accum_iter * cfg.accum_iter  # step at which this update's accumulation starts
            group = min(cfg.accum_iter, steps - first)
            is_update = step == first + group - 1
            if step == first:
                set_lr(self.optimizer, lr_at(cfg, self.epoch + (first / steps if cfg.lr_step == "iteration" else 0)))
            if mixup and cfg.mixup_in == "step":
                images, labels = mixup(images, labels)
            images = in_memory_format(cfg, images)
            with contextlib.nullcontext() if is_update or not self.can_skip_sync else self.parallel.no_sync():
                loss = self.step(images, labels, images.new_full((), group))
            self.can_skip_sync = self.dist.world_size > 1  # DDP learns its static graph from a backward pass that syncs
            if is_update:
                self._update()
            loss_sum += loss * len(images)
            seen += len(images)
        if step + 1 != steps:  # only a stream can end before; its processes would no longer be in step
            raise UserError(f"epoch {self.epoch + 1}: the training set ended after {step + 1} of {steps} batches")
        loss_sum, seen = distributed.sum_over_ranks(torch.stack([loss_sum, loss_sum.new_tensor(seen)])).tolist()
        self._refuse_not_finite(loss_sum)
        return loss_sum / seen

    def _step(self, images: Tensor, labels: Tensor, group: Tensor) -> Tensor:
        """The loss of one of the `group` batches of an update, and its gradient added to the others'."""
        if self.cfg.accum_iter == 1:
            self.optimizer.zero_grad()  # here, so that a CUDA graph has nothing to add the gradients to
        with autocast(self.cfg.amp, self.dist.device):
            loss = self.criterion(self.parallel(images), labels)
        self.scaler.scale(loss / group).backward()
        return loss.detach()

    def _update(self) -> None:
        if self.cfg.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.cfg.accum_iter > 1:
            self.optimizer.zero_grad(set_to_none=not self.cfg.cuda_graphs)
        if self.ema:
            self.ema.update(self.model)

    def _refuse_not_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is no longer finite in epoch {self.epoch + 1}: lower lr or use --amp bf16; "
                "what was saved before stays"
            )


def autocast(amp: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision of the kind `amp` ("fp16", "bf16" or "off") on `device`.

    On a CPU "fp16" is float32, which takes a fraction of the time there.
    """
    if amp == "off" or (amp == "fp16" and device.type == "cpu"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, AMP_DTYPES[amp])


def in_memory_format(cfg: Config, images: Tensor) -> Tensor:
    """The images [B,C,H,W] in the memory format that `cfg` asks for; event frames [B,T,C,H,W] as they are."""
    is_image = images.dim() == 4  # frames are brought into the order of time first; the weights' format decides then
    return images.contiguous(memory_format=torch.channels_last) if cfg.channels_last and is_image else images


@torch.inference_mode()
def evaluate(
    cfg: Config,
    dist: Dist,
    model: nn.Module,
    loader: Iterable,
    name: str = "test",
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict:
    """Accuracy over the whole test set, each sample counted once, however many processes share it.

    Args:
        on_batch: called with the images, labels and logits of every batch of this process.

    Returns:
        `loss` (mean cross-entropy), `top1` and `top5` (percent), `count` (samples).
    """
    model.eval()
    batches = []  # of each: loss, top-1, top-5, count
    for images, labels in progress(loader, name, cfg.log_interval, dist.is_main):
        with autocast(cfg.eval_amp or cfg.amp, dist.device):
            logits = model(in_memory_format(cfg, images))
        if on_batch:
            on_batch(images, labels, logits)
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        samples = [losses, hits[:, 0], hits.sum(1), torch.ones_like(losses)]
        batches.append(torch.stack([value.double() for value in samples]).sum(1))
    rows = distributed.gather(torch.stack(batches).tolist() if batches else [])
    if not rows:
        raise UserError("the test set holds no images")
    # fsum rounds once: the result does not depend on which process had which batch
    loss, top1, top5, count = map(math.fsum, zip(*rows, strict=True))
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": int(count)}
