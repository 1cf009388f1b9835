"""Learning rate, mixup and the training loop, without scripts."""

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch
from scripts import ROOT, refuses

from engine import checkpoint, config, world
from engine.cli import UserError
from engine.data.image import create_data
from engine.evaluate import evaluate
from engine.optim import create_optimizer, lr_at
from engine.run import _check_device, build_model, setup
from engine.trainer import Trainer, autocast

LOSSES = [2.3030338925685037, 2.312364332910037, 2.2400097693761825, 2.2621201550727075, 2.1888208477107765]


def configure(*flags):
    return config.load(ROOT / "digits/digits.yml", ["--batch-size", "128", *flags])


def trainer(cfg, batches=11, dtype=torch.float32, device="cpu"):
    here = world.setup(device)
    torch.manual_seed(cfg.seed)
    model = build_model(cfg).to(here.device, dtype)
    data = create_data(cfg, here)
    if batches:
        data = dataclasses.replace(data, train=FirstBatches(data.train, batches, dtype))
    return Trainer(cfg, here, model, create_optimizer(cfg, model), data)


class FirstBatches:
    """Loader of another's first `count` batches, in another type."""

    def __init__(self, loader, count, dtype):
        self.loader, self.count, self.dtype, self.dataset = loader, count, dtype, loader.dataset.dataset

    def __len__(self):
        return self.count

    def batches(self, epoch, first=0):
        batches = itertools.islice(self.loader.batches(epoch, first), self.count - first)
        return ((images.to(self.dtype), labels) for images, labels in batches)


def train_epochs(run, count=2):
    losses = []
    for epoch in range(count):
        run.begin_epoch(epoch)
        losses.append(run.train_epoch())
    return losses


def test_updates_accumulate_and_step_the_rate_per_iteration():
    flags = "--accum-iter 4 --lr-step iteration --mixup 0.5 --mixup-in step --time-steps 1"
    run, rates = trainer(cfg := configure(*flags.split())), []
    step = run.optimizer.step
    run.optimizer.step = lambda: (rates.append(run.optimizer.param_groups[0]["lr"]), step())
    run.train_epoch()
    steps = len(run.data.train)
    assert steps == 11  # the last update has three steps, not four
    assert rates == [lr_at(cfg, first / steps) for first in (0, 4, 8)]


def test_accumulated_gradients_are_the_mean_over_the_update(monkeypatch):
    """Three accumulated steps give the gradient of their mean loss if BatchNorm is frozen."""
    cfg = configure("--accum-iter", "100", "--batch-size", "32")
    run, losses, gradients = trainer(cfg, batches=3, dtype=torch.float64), [], []
    monkeypatch.setattr(run.model, "train", lambda mode=True: torch.nn.Module.train(run.model, False))
    monkeypatch.setattr(run.optimizer, "step", lambda: gradients.extend(p.grad.clone() for p in run.model.parameters()))
    criterion = run.criterion
    run.criterion = lambda logits, target: losses.append(criterion(logits, target)) or losses[-1]
    monkeypatch.setattr(torch.Tensor, "backward", functools.partialmethod(torch.Tensor.backward, retain_graph=True))
    run.train_epoch()
    run.model.zero_grad()
    torch.stack(losses).mean().backward()
    for gradient, expected in zip(gradients, run.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flags", ["--mixup 1 --mixup-in loader", "--mixup 1 --mixup-in step", "--cutmix 1"])
def test_mixing_ends_at_its_epoch_in_the_workers_too(flags):
    flags += " --mixup-off-epoch 1 --workers 2 --smoothing 0 --time-steps 1 --batch-size 240"
    run, mixed = trainer(configure(*flags.split()), batches=5), []
    criterion = run.criterion
    run.criterion = lambda logits, target: mixed.append((target.max(1).values < 1).any()) or criterion(logits, target)
    train_epochs(run)
    assert sum(mixed[:5]) >= 4
    assert not any(mixed[5:])


def test_loss_sequence_of_a_fixed_seed():
    """Guard for refactoring: float64 on the CPU, five updates. Update it after intended changes of training."""
    run, losses = trainer(configure("--warmup-epochs", "0", "--lr", "1e-2"), batches=5, dtype=torch.float64), []
    criterion = run.criterion
    run.criterion = lambda logits, target: losses.append(criterion(logits, target)) or losses[-1]
    run.train_epoch()
    assert [loss.item() for loss in losses] == pytest.approx(LOSSES, rel=1e-9)


def test_a_test_loss_that_is_not_finite_or_of_nothing_is_refused():
    run = trainer(configure("--lr", "1", "--epochs", "1"), batches=1)
    run.model.head.bias.data[0] = float("inf")
    result, *_ = evaluate(run.cfg, run.world, run.model, run.data.test)
    with refuses("epoch 1"):
        run.end_epoch(result)
    with refuses():
        evaluate(run.cfg, run.world, run.model, [])


def test_resuming_keeps_the_configured_optimizer_settings():
    first, second = trainer(configure(), batches=1), trainer(configure("--weight-decay", "0.5"), batches=1)
    first.train_epoch()
    second.restore(first.state())
    assert {group["weight_decay"] for group in second.optimizer.param_groups} == {0.5}
    assert second.optimizer.state_dict()["state"][0]["step"] == 1


def test_the_digits_split_is_fixed_and_disjoint():
    data = create_data(configure(), world.setup("cpu"))
    train, test = data.train.dataset.dataset, data.test.dataset
    assert (len(train), len(test)) == (1437, 360)
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in test.images) == 0
    assert test.labels[:8] == [7, 6, 3, 7, 7, 3, 2, 8]


def test_the_average_of_the_weights_is_kept_evaluated_and_resumed():
    run = trainer(configure("--ema-decay", "0.75"), batches=1, dtype=torch.float64)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train_epoch()
    for name, average in run.ema.module.state_dict().items():
        after = run.model.state_dict()[name]
        if average.is_floating_point():
            torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * after, rtol=1e-9, atol=1e-12)
    assert run.evaluated is run.ema.module
    again = trainer(configure("--ema-decay", "0.75"), batches=1, dtype=torch.float64)
    again.restore(run.state())
    kept = again.ema.module.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in run.ema.module.state_dict().items())
    fresh = trainer(configure("--ema-decay", "0.75"), batches=1, dtype=torch.float64)
    fresh.restore(run.state() | {"state_dict_ema": None})  # of a run without: the average starts from the weights
    assert torch.equal(fresh.ema.module.head.weight, run.model.head.weight)


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_gradients_are_clipped_to_their_norm(limit):
    run, norms = trainer(configure("--clip-grad", str(limit)), batches=1, dtype=torch.float64), []
    run.optimizer.step = lambda: norms.append(torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]))
    run.train_epoch()
    (norm,) = norms
    assert norm == pytest.approx(limit, rel=1e-3) if limit < 1 else 0.01 < norm < 100


@pytest.mark.parametrize(
    ("amp", "has_bf16", "dtype"),
    [("fp16", True, torch.float32), ("bf16", True, torch.bfloat16), ("bf16", False, torch.float32)],
)
def test_a_cpu_computes_in_float32_what_it_has_no_instructions_for(amp, has_bf16, dtype, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    with autocast(amp, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


class ActedGraph:
    """Stand-in for a CUDA graph on a CPU: replays write gradients where the capture did; `p.grad` stays."""

    def __init__(self, step):
        self.step, self.warmup, self.captured = step, 2, None
        self.parameters = list(step.__self__.model.parameters())

    def __call__(self, *inputs):
        before = [p.grad for p in self.parameters]
        for p, captured in zip(self.parameters, self.captured or before, strict=True):
            p.grad = captured
        loss = self.step(*inputs)
        if self.captured is None:
            self.captured = [p.grad for p in self.parameters] if self.warmup == 0 else None
            self.warmup -= 1
            return loss
        for p, captured, grad in zip(self.parameters, self.captured, before, strict=True):
            captured.copy_(p.grad)
            p.grad = grad
        return loss


@pytest.mark.parametrize("accum_iter", ["1", "3"])
def test_a_step_can_be_replayed(accum_iter, monkeypatch):
    monkeypatch.setattr("engine.trainer.GraphedStep", ActedGraph)
    flags = ["--accum-iter", accum_iter, "--lr-step", "iteration", "--time-steps", "1", "--warmup-epochs", "0"]
    eager, replayed = (trainer(configure(*flags, *more), batches=4) for more in ([], ["--cuda-graphs"]))
    for run in (eager, replayed):
        train_epochs(run)
    assert replayed.step.captured
    for actual, expected in zip(replayed.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("flags", "benchmark", "tf32"), [([], True, False), (["--no-cudnn-benchmark", "--tf32"], False, True)]
)
def test_the_flags_decide_how_a_gpu_computes(flags, benchmark, tf32):
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32
    try:
        cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = not benchmark, not tf32, not tf32
        setup(configure(*flags))
        assert (cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32) == (benchmark, tf32, tf32)
    finally:
        cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = before


@pytest.mark.parametrize(
    ("flags", "is_tested", "is_refused"),
    [
        ([], True, False),
        (["--lif-backend", "triton"], True, False),  # the network refuses it later
        (["--lif-backend", "torch"], False, False),
        (["--compile"], False, False),
        (["--pack-spikes"], True, True),
        (["--cuda-graphs"], True, True),
    ],
)
def test_kernels_that_fail_on_every_rank_end_only_what_needs_them(flags, is_tested, is_refused, monkeypatch):
    tests = []
    problem = "computes 17 for 4; use lif_backend='torch'"
    monkeypatch.setattr("engine.run.triton_problem", lambda: tests.append(1) or problem)
    with pytest.raises(UserError) if is_refused else contextlib.nullcontext():
        _check_device(configure(*flags), world.World(0, 1, torch.device("cuda")))
    assert len(tests) == is_tested


def test_kernels_that_fail_on_one_rank_end_the_run(monkeypatch):
    monkeypatch.setattr("engine.run.triton_problem", lambda: None)
    monkeypatch.setattr("engine.world.gather", lambda values: [*values, "computes 17 for 4; use lif_backend='torch'"])
    with refuses("rank 1", "computes 17 for 4"):
        _check_device(configure(), world.World(0, 2, torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        "--clip-grad 1 --ema-decay 0.9 --channels-last",
        "--accum-iter 2 --drop-path 0.2 --opt sgd",
        "--accum-iter 2 --grad-checkpointing --mixup 0.5 --mixup-in step",
        "--amp fp16 --clip-grad 1",
        "--amp fp16 --accum-iter 2 --grad-checkpointing",
    ],
)
def test_cuda_graphs_train_to_the_same_weights(flags, monkeypatch):
    """Train with a rate that changes each step, and with one step in the last of the accumulated updates."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = ["--lr-step", "iteration", "--lif-backend", "torch", "--warmup-epochs", "1", *flags.split()]
    is_exact = "fp16" not in flags
    runs, losses = [], []
    for more in ([], ["--cuda-graphs"]):
        cfg = configure(*settings, *more)
        run = trainer(cfg, batches=9, dtype=torch.float64 if is_exact else torch.float32, device="cuda")
        losses += train_epochs(run)
        runs.append(run)
    eager, graphed = runs
    assert graphed.step.graph
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if is_exact else {"rtol": 0.05, "atol": 0.02}
    assert losses[2:] == pytest.approx(losses[:2], rel=tolerance["rtol"])
    assert graphed.scaler.get_scale() == eager.scaler.get_scale()
    kept = graphed.evaluated.state_dict()
    for name, expected in eager.evaluated.state_dict().items():
        torch.testing.assert_close(kept[name], expected, **tolerance)


@pytest.mark.gpu
def test_a_run_moves_between_cpu_and_gpu(tmp_path):
    """Move the optimizer too: fused AdamW counts its steps on the GPU, the other one on the CPU."""
    runs = [trainer(configure(), batches=1, device=device) for device in ("cpu", "cuda", "cpu")]
    for run in runs:
        if run is not runs[0]:
            run.restore(checkpoint.read(tmp_path / "last.pt"))
        run.train_epoch()
        run.begin_epoch(run.epoch + 1)  # a state at the end of an epoch has nothing left to train
        checkpoint.save(tmp_path / "last.pt", run.state() | {"config": {}})
    assert [run.optimizer.param_groups[0]["fused"] for run in runs] == [None, True, None]
    assert runs[2].optimizer.state_dict()["state"][0]["step"] == 3
