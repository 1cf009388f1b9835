"""Updates in float64 on fixed batches of 8 images, shared by all ranks; rank 0 saves gradients and weights.

BatchNorm keeps its running statistics, because those of a batch differ from rank to rank.

python first_step.py RESULT.pt [flag ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from engine import config, world
from engine.data.loaders import Data
from engine.optim import create_optimizer
from engine.run import build_model
from engine.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[1] / "digits/digits.yml"


class Batches(list):
    """Loader of (images, labels) in a fixed order."""

    def batches(self, epoch, first=0):
        return iter(self[first:])


def calibrated(model, x=None):
    """Return a network that spikes on `x` (default: noise for the digits), with fixed running statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.constant_(module.weight, 1.5), nn.init.constant_(module.bias, 0.3)
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.randn(32, 1, 8, 8) if x is None else x)
    model.train = lambda mode=True: nn.Module.train(model, False)
    return model


@world.membership()
def main(result, *flags):
    torch.set_default_dtype(torch.float64)
    cfg = config.load(RECIPE, ["--time-steps", "2", "--smoothing", "0", *flags])
    here = world.setup("cpu")
    torch.manual_seed(0)
    steps = []
    for _ in range(2):
        images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
        parts = [x.chunk(cfg.accum_iter) for x in (images, labels)]
        steps += [
            (x[here.rank :: here.world_size], y[here.rank :: here.world_size]) for x, y in zip(*parts, strict=True)
        ]
    model = calibrated(build_model(cfg))
    trainer = Trainer(cfg, here, model, create_optimizer(cfg, model), Data(Batches(steps), [], [], None, None))
    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    loss = trainer.train_epoch()
    if here.is_main:
        torch.save({"gradients": gradients, "state": model.state_dict(), "loss": loss}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
