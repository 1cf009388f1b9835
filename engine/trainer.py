"""The one training loop, and evaluation, for every data set."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable

import timm.utils
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import world as distributed
from .cli import Stopped, StopRequest, UserError
from .config import Config, mixes
from .data.loaders import Data, reseed
from .graphs import GraphedStep
from .log import RunLog, logger, progress
from .optim import lr_at, set_lr, total_epochs
from .world import Agreement, World

NO_BEST = {"epoch": None, "test_top1": -1.0}
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LOWEST_SCALE = 2.0**-10  # of the loss; it starts at 2^16 and is halved by each update whose gradient overflows


class Trainer:
    """A network with all that its training carries from step to step; `state` and `restore` are what resumes it.

    The randomness of a step depends on the seed, the epoch, the rank and the step alone, so none of it needs saving.
    """

    def __init__(self, cfg: Config, world: World, model: nn.Module, optimizer: torch.optim.Optimizer, data: Data):
        self.cfg, self.world, self.model, self.optimizer, self.data = cfg, world, model, optimizer, data
        self.ema = ModelEmaV3(model, decay=cfg.ema_decay) if cfg.ema_decay is not None else None
        if cfg.compile:
            model.compile()
        self.parallel = model
        if world.world_size > 1:
            ids = [world.device] if world.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        self.criterion = SoftTargetCrossEntropy() if mixes(cfg) else LabelSmoothingCrossEntropy(cfg.smoothing)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.amp == "fp16" and world.device.type == "cuda")
        self.step = GraphedStep(self._step) if cfg.cuda_graphs else self._step
        self.agreement = Agreement()
        self.epoch = 0  # epochs done
        self.steps = len(data.train)  # of an epoch
        self.begin_epoch()
        self.best = dict(NO_BEST)

    def begin_epoch(self) -> None:
        """Nothing is done yet of the epoch that `epoch` names."""
        self.steps_done = 0
        self.loss_sum, self.seen = torch.zeros((), dtype=torch.float64, device=self.world.device), 0

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the average of the weights where there is one."""
        return self.ema.module if self.ema else self.model

    def state(self) -> dict:
        """Plain data from which `restore` goes on as if nothing had happened; within an epoch all processes call it."""
        own = {"loss_sum": self.loss_sum.item(), "seen": self.seen}
        is_within = 0 < self.steps_done < self.steps
        if is_within and self.world.world_size > 1:  # then each has its own running statistics, see `train_epoch`
            own["buffers"] = [{k: v.cpu() for k, v in model.named_buffers()} for model in self._models()]
        return {
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "position": {
                "steps_done": self.steps_done,
                "order": self._order(),
                "processes": distributed.gather([own]) if is_within else [own],
            },
            "best": self.best,
        }

    def _models(self) -> list[nn.Module]:
        return [self.model, self.ema.module] if self.ema else [self.model]

    def _order(self) -> dict[str, int]:
        """What decides which samples a step sees."""
        return {
            "steps": self.steps,
            "world_size": self.world.world_size,
            "workers": getattr(self.data.train, "workers", 0),
            **{key: getattr(self.cfg, key) for key in ("batch_size", "accum_iter", "seed")},
        }

    def restore(self, state: dict) -> None:
        """Take up what `state` saved, but for the optimizer's settings, which are the configuration's."""
        self.model.load_state_dict(state["state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state.get("state_dict_ema") or state["state_dict"])
        groups = zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False)
        for saved, group in groups:  # before loading, for they decide on which device what is loaded lies
            saved.update({k: v for k, v in group.items() if k not in ("params", "lr")})  # the rate is set at each step
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best = state["epoch"], state["best"]
        self._restore_position(**state["position"])

    def _restore_position(self, steps_done: int, order: dict, processes: list[dict]) -> None:
        is_trained = steps_done == order.get("steps")  # and only to be evaluated
        if steps_done and not is_trained and order != self._order():
            changed = ", ".join(
                f"{k} was {order.get(k)} and is {v}" for k, v in self._order().items() if order.get(k) != v
            )
            logger.warning(
                f"warning: saved after step {steps_done} of epoch {self.epoch + 1}, which cannot go on there "
                f"({changed}): the epoch begins anew, from the weights of that step"
            )
            return
        own = processes[self.world.rank if len(processes) == self.world.world_size else 0]
        self.steps_done = self.steps if is_trained else steps_done
        self.loss_sum.fill_(own["loss_sum"])
        self.seen = own["seen"]
        for model, buffers in zip(self._models(), own.get("buffers", ()), strict=False):
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])

    def fit(
        self,
        log: RunLog | None,
        save: Callable[[bool], None],
        stop: StopRequest | None = None,
        watch: Callable[[nn.Module, Tensor], None] = lambda model, images: None,
    ) -> None:
        """Train to the last epoch; after each, evaluate, record (`log` in the main process) and `save(is_best)`.

        Args:
            save: called by all processes.
            stop: what is asked after each update and each batch of an evaluation.
            watch: called after each evaluation with the network and some of the test set's samples.

        Raises:
            Stopped: `stop` asked for it; all is saved.
        """
        epochs = total_epochs(self.cfg)
        while self.epoch < epochs:
            self._fit_epoch(f"epoch {self.epoch + 1}/{epochs}", stop or StopRequest(), log, save, watch)

    def _fit_epoch(self, name: str, stop: StopRequest, log: RunLog | None, save: Callable, watch: Callable) -> None:
        def after_update():
            number = self.agreement.largest(stop.signal or 0)
            updates = self.steps_done // self.cfg.accum_iter
            if number or (self.cfg.save_steps and updates % self.cfg.save_steps == 0):
                save(False)
            if number:
                end(number, f"after step {self.steps_done} of epoch {self.epoch + 1}")

        some = []

        def while_evaluating(images: Tensor, labels: Tensor, logits: Tensor) -> bool:
            if not some:
                some.append(images[:32])
            return bool(stop.signal)

        def after_evaluating():
            if number := self.agreement.largest(stop.signal or 0):
                save(False)
                end(number, f"in the evaluation of epoch {self.epoch + 1}")

        def end(number: int, where: str):
            self.agreement.largest(0)  # a launcher that sees one process end may not wait for the one that saves
            raise Stopped(number, where)

        start = time.monotonic()
        train_loss = self.train_epoch(name, after_update)
        result = evaluate(
            self.cfg, self.world, self.evaluated, self.data.test, f"{name} test", while_evaluating, after_evaluating
        )
        self._refuse_not_finite(result["loss"])
        if some and self.world.is_main:
            watch(self.evaluated, some[0])
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
        self.begin_epoch()
        save(is_best)
        logger.info(
            f"{name}: lr {row['lr']:.2e}, train loss {train_loss:.4f}, test loss {row['test_loss']:.4f}, "
            f"top-1 {row['test_top1']:.2f} %, best {self.best['test_top1']:.2f} % "
            f"(epoch {self.best['epoch'] + 1}), {row['seconds']:.1f} s"
        )

    def train_epoch(self, name: str, after_update: Callable[[], None] = lambda: None) -> float:
        """One pass over the training set, or what is left of it; returns the mean loss over all processes.

        Each process has its own running statistics up to the end; then all have their mean.
        """
        if self.steps_done < self.steps:
            self._train_steps(name, after_update)
            totals = torch.stack([self.loss_sum, self.loss_sum.new_tensor(self.seen)])
            self.loss_sum, self.seen = distributed.sum_over_ranks(totals)
            self._refuse_not_finite(self.loss_sum.item())
            self._refuse_collapsed_scale()
            if self.world.world_size > 1:
                for model in self._models():
                    timm.utils.distribute_bn(model, self.world.world_size, reduce=True)
            self.seen = int(self.seen)
        return self.loss_sum.item() / self.seen

    def _train_steps(self, name: str, after_update: Callable[[], None]) -> None:
        cfg, mixup, key = self.cfg, self.data.mixup, (self.cfg.seed, self.epoch, self.world.rank)
        reseed(*key)  # the order of the samples hangs on this one
        if mixup:
            mixup.mixup_enabled = cfg.mixup_off_epoch is None or self.epoch < cfg.mixup_off_epoch
        self.parallel.train()

        def status() -> dict:
            self._refuse_not_finite(self.loss_sum.item())
            self._refuse_collapsed_scale()
            return {
                "loss": f"{self.loss_sum.item() / self.seen:.4f}",
                "lr": f"{self.optimizer.param_groups[0]['lr']:.2e}",
            }

        batches = self.data.train.batches(self.epoch, self.steps_done)
        shown = progress(batches, name, cfg.log_interval, self.world.is_main, status, self.steps, self.steps_done)
        for step, (images, labels) in enumerate(shown, self.steps_done):
            reseed(*key, step + 1)
            first = step // cfg.accum_iter * cfg.accum_iter  # step at which this update's accumulation starts
            group = min(cfg.accum_iter, self.steps - first)
            is_update = step == first + group - 1
            if step == first:
                part = first / self.steps if cfg.lr_step == "iteration" else 0
                set_lr(self.optimizer, lr_at(cfg, self.epoch + part))
            if self.data.augment:
                images = self.data.augment(images)
            if mixup and cfg.mixup_in == "step":
                images, labels = mixup(images, labels)
            images = in_memory_format(cfg, images)
            with contextlib.nullcontext() if is_update or self.world.world_size == 1 else self.parallel.no_sync():
                loss = self.step(images, labels, images.new_full((), group))
            if is_update:
                self._update()
            self.loss_sum += loss * len(images)
            self.seen += len(images)
            self.steps_done = step + 1
            if is_update and self.steps_done < self.steps:
                after_update()
        if self.steps_done != self.steps:  # only a stream can end before; its processes would no longer be in step
            raise UserError(
                f"epoch {self.epoch + 1}: the training set ended after {self.steps_done} of {self.steps} batches"
            )

    def _step(self, images: Tensor, labels: Tensor, group: Tensor) -> Tensor:
        """The loss of one of the `group` batches of an update, and its gradient added to the others'."""
        if self.cfg.accum_iter == 1:
            self.optimizer.zero_grad()  # here, so that a CUDA graph has nothing to add the gradients to
        with autocast(self.cfg.amp, self.world.device):
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

    def _refuse_collapsed_scale(self) -> None:
        if self.scaler.is_enabled() and (scale := self.scaler.get_scale()) < LOWEST_SCALE:
            raise UserError(
                f"fp16 gradients overflow again and again in epoch {self.epoch + 1} (loss scale {scale:.1e}): use "
                "--amp bf16, --clip-grad 1 or a lower lr; what was saved before stays"
            )

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
    world: World,
    model: nn.Module,
    loader: Iterable,
    name: str = "test",
    on_batch: Callable[[Tensor, Tensor, Tensor], bool | None] | None = None,
    on_end: Callable[[], None] | None = None,
) -> dict:
    """Accuracy over the whole test set, each sample counted once, however many processes share it.

    Args:
        on_batch: called with the images, labels and logits of every batch of this process; what is true ends them.
        on_end: called by all processes behind their last batch.

    Returns:
        `loss` (mean cross-entropy), `top1` and `top5` (percent), `count` (samples).
    """
    model.eval()
    batches = []  # of each: loss, top-1, top-5, count
    for images, labels in progress(loader, name, cfg.log_interval, world.is_main):
        with autocast(cfg.eval_amp or cfg.amp, world.device):
            logits = model(in_memory_format(cfg, images))
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        samples = [losses, hits[:, 0], hits.sum(1), torch.ones_like(losses)]
        batches.append(torch.stack([value.double() for value in samples]).sum(1))
        if on_batch and on_batch(images, labels, logits):
            break
    if on_end:
        on_end()
    rows = distributed.gather(torch.stack(batches).tolist() if batches else [])
    if not rows:
        raise UserError("the test set holds no images")
    # fsum rounds once: the result does not depend on which process had which batch
    loss, top1, top5, count = map(math.fsum, zip(*rows, strict=True))
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": int(count)}
