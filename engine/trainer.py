"""Training: the state of a run, its epochs and steps, and its checkpoints."""

import contextlib
import math
from pathlib import Path

import timm.utils
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import checkpoint
from . import world as distributed
from .cli import Stopped, StopRequest, UserError
from .config import LOCAL_FIELDS, Config, mixes, plain
from .data.loaders import Data, reseed
from .graphs import GraphedStep
from .log import logger, progress
from .optim import create_schedule, total_epochs
from .world import World, autocast

NO_BEST = {"epoch": None, "test_top1": -1.0}
LOWEST_SCALE = 2.0**-10  # of the loss; it starts at 2^16, and each update with an overflow halves it


class Trainer:
    """A network in training, and its checkpoints in `folder`.

    The randomness of a step depends on seed, epoch, rank and step alone, so no generator is saved.
    """

    def __init__(
        self, cfg: Config, world: World, model: nn.Module, optimizer: Optimizer, data: Data, folder: Path | None = None
    ):
        self.cfg, self.world, self.model, self.optimizer, self.data = cfg, world, model, optimizer, data
        self.folder, self.stop_request = folder, StopRequest()
        self.ema = ModelEmaV3(model, decay=cfg.ema_decay) if cfg.ema_decay is not None else None
        self.models = [model, self.ema.module] if self.ema else [model]
        self.evaluated = self.models[-1]
        if cfg.compile:
            model.compile()
        self.parallel = DistributedDataParallel(model, broadcast_buffers=False) if world.world_size > 1 else model
        self.criterion = SoftTargetCrossEntropy() if mixes(cfg) else LabelSmoothingCrossEntropy(cfg.smoothing)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.amp == "fp16" and world.device.type == "cuda")
        self.step = GraphedStep(self._step) if cfg.cuda_graphs else self._step
        self.schedule = create_schedule(cfg, optimizer)
        self.steps = len(data.train)  # of an epoch
        settings = {key: getattr(cfg, key) for key in ("batch_size", "accum_iter", "seed")}
        settings["workers"] = getattr(data.train, "workers", 0)
        self.order = {"steps": self.steps, "world_size": world.world_size, **settings}  # decides the samples of a step
        self.best = dict(NO_BEST)
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.steps_done = epoch, 0  # both count what is done
        self.name = f"epoch {epoch + 1}/{total_epochs(self.cfg)}"
        self.loss_sum, self.seen = torch.zeros((), dtype=torch.float64, device=self.world.device), 0

    def state(self) -> dict:
        """Return plain data from which `restore` continues bit for bit; within an epoch all ranks call it."""
        process = {"loss_sum": self.loss_sum.item(), "seen": self.seen}
        is_within = 0 < self.steps_done < self.steps
        if is_within and self.world.world_size > 1:  # then each rank has its own running statistics
            process["buffers"] = [{k: v.cpu() for k, v in model.named_buffers()} for model in self.models]
        processes = distributed.gather([process]) if is_within else [process]
        return {
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "position": {"steps_done": self.steps_done, "order": self.order, "processes": processes},
            "best": self.best,
        }

    def restore(self, state: dict) -> None:
        """Continue from `state`, with the optimizer settings of the configuration."""
        self.model.load_state_dict(state["state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state.get("state_dict_ema") or state["state_dict"])
        # before loading, which places the state as these settings say
        for saved, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False):
            saved.update({k: v for k, v in group.items() if k not in ("params", "lr", "lookahead_step")})
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        self.begin_epoch(state["epoch"])
        steps_done, order, processes = (state["position"][key] for key in ("steps_done", "order", "processes"))
        is_trained = steps_done == order.get("steps")  # and only the evaluation is left
        if steps_done and not is_trained and order != self.order:
            changes = [f"{k} {order.get(k)} -> {v}" for k, v in self.order.items() if order.get(k) != v]
            logger.warning(f"warning: {self.name}: starts again with the weights of a step ({', '.join(changes)})")
            return
        rank = self.world.rank if len(processes) == self.world.world_size else 0
        self.steps_done = self.steps if is_trained else steps_done
        self.loss_sum.fill_(processes[rank]["loss_sum"])
        self.seen = processes[rank]["seen"]
        for model, buffers in zip(self.models, processes[rank].get("buffers", ()), strict=False):
            model.load_state_dict(buffers, strict=False)

    def resume(self, state: dict, path: Path, new_run: bool) -> None:
        """Continue from a checkpoint as `--resume` says; of a released one only the epoch counts here."""
        if state["format"] == "qkformer":
            try:
                self.restore(state)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(f"--resume {path}: damaged ({type(error).__name__}: {error})") from None
        else:
            self.begin_epoch(state["epoch"] + 1)
            logger.warning(f"{path}: weights and epoch are resumed, {self.cfg.opt} starts from scratch")
        if new_run:
            self.best = dict(NO_BEST)
        step = f" and step {self.steps_done} of the next" if self.steps_done else ""
        logger.info(f"resumed {path} after epoch {self.epoch}{step}")

    def save(self, is_best: bool = False) -> None:
        """Write `last.pt`, and `best.pt` if it is the best, from the main rank; all ranks call it."""
        config = plain(self.cfg, without=LOCAL_FIELDS) | {"recipe": Path(self.cfg.config).stem}
        content = self.state() | {"config": config, "classes": list(self.data.classes)}
        if not self.world.is_main:
            return
        weights = [*content["state_dict"].values(), *(content["state_dict_ema"] or {}).values()]
        is_sound = torch.stack([value.isfinite().all() for value in weights]).all()  # the loss may hide NaN
        self._require(is_sound, "weights are not finite; lower lr, or use --clip-grad 1 or --amp bf16")
        if is_best:  # first: after a kill in between, the epoch is evaluated again
            checkpoint.save(self.folder / "best.pt", content)
        checkpoint.save(self.folder / "last.pt", content, self.cfg.keep)

    def stop_if_asked(self, where: str, is_due: bool = False) -> None:
        """Save if `is_due` or any rank got a signal; after a signal raise `Stopped`. All ranks call it."""
        number = distributed.largest(self.stop_request.signal or 0)
        if number or is_due:
            self.save()
        if number:
            distributed.largest(0)  # a launcher may end all ranks once one has ended: wait for the one that saves
            raise Stopped(number, f"{where} of epoch {self.epoch + 1}")

    def end_epoch(self, result: dict) -> bool:
        """Count the epoch that was trained and evaluated; return True if it is the best so far."""
        self._require_finite(result["loss"])
        is_best = result["top1"] > self.best["test_top1"]
        if is_best:
            self.best = {"epoch": self.epoch, "test_top1": result["top1"]}
        self.begin_epoch(self.epoch + 1)
        return is_best

    def train_epoch(self) -> float:
        """Train on the rest of an epoch; return its mean loss over all ranks."""
        if self.steps_done < self.steps:
            self._train_steps()
            if self.world.world_size > 1:
                totals = torch.stack([self.loss_sum, self.loss_sum.new_tensor(self.seen)])
                torch.distributed.all_reduce(totals)
                self.loss_sum, self.seen = totals[0], int(totals[1])
                for model in self.models:  # each rank has its own running statistics until now
                    timm.utils.distribute_bn(model, self.world.world_size, reduce=True)
            self._require_finite(self.loss_sum.item())
        return self.loss_sum.item() / self.seen

    def _train_steps(self) -> None:
        cfg, world, mixup = self.cfg, self.world, self.data.mixup
        key = cfg.seed, self.epoch, world.rank
        reseed(*key)  # the order of the samples
        if mixup:
            mixup.mixup_enabled = not cfg.mixup_off_epoch or self.epoch < cfg.mixup_off_epoch
        self.parallel.train()
        batches = self.data.train.batches(self.epoch, self.steps_done)
        shown = progress(batches, self.name, cfg.log_interval, world.is_main, self._status, self.steps, self.steps_done)
        for step, (images, labels) in enumerate(shown, self.steps_done):
            reseed(*key, step + 1)
            first = step // cfg.accum_iter * cfg.accum_iter  # step of this update
            group = min(cfg.accum_iter, self.steps - first)
            is_update = step == first + group - 1
            if step == first:
                self.schedule.step(self.epoch + (first / self.steps if cfg.lr_step == "iteration" else 0))
            if self.data.augment:
                images = self.data.augment(images)
            if mixup and cfg.mixup_in == "step":
                images, labels = mixup(images, labels)
            with contextlib.nullcontext() if is_update or world.world_size == 1 else self.parallel.no_sync():
                loss = self.step(images, labels, images.new_full((), group))
            if is_update:
                self._update()
            self.loss_sum += loss * len(images)
            self.seen += len(images)
            self.steps_done = step + 1
            if is_update and self.steps_done < self.steps:
                is_due = cfg.save_steps and self.steps_done // cfg.accum_iter % cfg.save_steps == 0
                self.stop_if_asked(f"after step {self.steps_done}", is_due)
        if self.steps_done != self.steps:  # a stream that ends early would leave ranks out of step
            raise UserError(f"training set: ended after {self.steps_done} of {self.steps} batches; is a shard missing?")

    def _step(self, images: Tensor, labels: Tensor, group: Tensor) -> Tensor:
        """Return the loss of one of the `group` batches of an update, and add its gradient to the others'."""
        if self.cfg.accum_iter == 1:
            self.optimizer.zero_grad()  # here: a CUDA graph overwrites gradients that are None
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

    @property
    def lr(self) -> float:
        """Learning rate without the factors of `layer_decay`."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _status(self) -> dict:
        loss = self.loss_sum.item()
        self._require_finite(loss)
        return {"loss": f"{loss / self.seen:.4f}", "lr": f"{self.lr:.2e}"}

    def _require_finite(self, loss: float) -> None:
        self._require(math.isfinite(loss), f"the loss is {loss}; lower lr, or use --amp bf16")
        scale = self.scaler.get_scale()  # 1 unless it is enabled
        self._require(scale >= LOWEST_SCALE, f"fp16 gradients overflow (scale {scale:.1e}); use --amp bf16")

    def _require(self, is_sound: bool, problem: str) -> None:
        if not is_sound:
            raise UserError(f"epoch {self.epoch + 1}: {problem}. Earlier checkpoints stay")
