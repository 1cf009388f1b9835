"""Self-test of the kernels on a device: compare a small network and two blocks with their modules."""

import copy
import functools
import logging

import torch
import triton
from torch import nn

from ..layers import SpikingMLP
from ..qkformer import ATTENTIONS, Block, HierarchicalSpikingTransformer
from . import gpu, plan

logger = logging.getLogger(__name__)  # silent unless a program adds a handler, as `engine.log` does
ROUNDING = 1e-6  # largest deviation in float64, relative to the norm
SMALL = {"family": "cifar", "width": 64, "depths": (1, 1, 1), "heads": 8, "in_chans": 1, "num_classes": 10}
FLIPS = 0.2  # share of spikes that rounding may flip in half precision


def problem(device: str) -> str | None:
    """Return the problem on `device`, or None. Compiling the kernels takes half a minute the first time."""
    logger.info(f"testing the Triton kernels (about 30 s the first time; cached in {triton.knobs.cache.dir})")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
        return _in_double(device) or _in_half(device)


def _in_double(device: str) -> str | None:
    """Compare a training step of a network in float64, where rounding flips no spikes."""
    x = torch.randn(8, 1, 16, 16, dtype=torch.float64).to(device)
    reference = HierarchicalSpikingTransformer(**SMALL).double().to(device)
    fused = copy.deepcopy(reference)
    fused.fast_path = functools.partial(plan.stage_outputs, ops=gpu)
    results = []
    for model in (fused, reference):
        logits = model(x)
        logits.square().sum().backward()
        results.append((logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for quantity, a, b in zip(("logits", "gradients"), *results, strict=True):
        if not (a - b).norm() <= ROUNDING * b.norm():
            return f"computes other {quantity} than torch"
    return None


@torch.no_grad()
def _in_half(device: str) -> str | None:
    """Compare single blocks in half precision, because rounding flips more spikes from layer to layer."""
    x = (torch.rand(4, 8, 64, 4, 4) < 0.3).half().to(device)
    for kind in ("token", "self"):
        block = Block(ATTENTIONS[kind](64, heads=4), SpikingMLP(64, 128)).half().to(device)
        for module in block.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0  # evaluate with the statistics of training
                module.weight.fill_(3)  # else few neurons fire
        for train in (True, False):
            reference = block.train(train)(x)
            fused = plan.forward(block, x.permute(0, 1, 3, 4, 2).contiguous(), run=plan.Run(len(x), gpu))
            flipped = (fused.permute(0, 1, 4, 2, 3) - reference).float().abs().sum()
            if not flipped <= FLIPS * (reference - x).float().sum():
                return f"computes other spikes than torch in half precision ({kind} attention)"
    return None
