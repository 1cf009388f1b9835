"""Runs that were stopped, killed or damaged: they resume to the same bits, and report problems."""

import os
import signal
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scripts import fail, here, named, refuses, rows_in, run, same, signal_at_step, succeed
from test_engine import configure
from test_engine import trainer as engine_trainer
from tiny_data import cifar10_dvs

from engine import checkpoint
from engine.cli import Stopped, StopRequest, guard
from engine.data.loaders import TrainLoader
from engine.weights import silent_layers, warn_of_silence

IMAGES = (
    "digits/train.py --batch-size 240 --epochs 2 --time-steps 1 --drop-path 0.3 --ema-decay 0.9 --accum-iter 2 --mixup "
    "0.5 --reprob 0.5 --remode pixel --auto-augment rand-m9-mstd0.5-inc1 --hflip 0.5 --warmup-epochs 0"
).split()
EVENTS = (
    "cifar10-dvs/train.py --batch-size 4 --epochs 1 --time-steps 1 --mlp-ratio 1 --drop-path 0.3 --mixup 0.5 "
    "--mixup-in step --auto-augment snn-wide --hflip 0.5 --warmup-epochs 0 --cooldown-epochs 0 --accum-iter 1"
).split()  # 5 steps an epoch


def position(folder):
    """Return the saved numbers of epochs, and of steps of the next one."""
    state = checkpoint.read(folder / "last.pt")
    return state["epoch"], state["position"]["steps_done"]


@pytest.mark.parametrize(("arguments", "steps", "left"), [(IMAGES, 4, 1), (EVENTS, 2, 3)], ids=["images", "events"])
def test_a_run_resumes_at_the_step_where_it_was_stopped(arguments, steps, left, tmp_path):
    if arguments is EVENTS:
        arguments = [*EVENTS, "--data-path", cifar10_dvs(tmp_path / "data", per_class=3, count=50)]
    succeed(*arguments, "--workers", "0", "--output-dir", tmp_path / "whole")
    cut = [*arguments, "--output-dir", tmp_path / "cut", "--resume", "auto"]
    result = run(*cut, "--workers", "0", before=signal_at_step(signal.SIGTERM, 2))
    assert (result.returncode, position(tmp_path / "cut")) == (143, (0, steps))
    result = run(*cut, "--workers", "2", before=signal_at_step(signal.SIGINT, left))  # the epoch's last
    assert (result.returncode, position(tmp_path / "cut")) == (130, (0, 5))
    succeed(*cut, "--workers", "1")
    states = [checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "cut")]
    assert same(
        *({key: state[key] for key in ("state_dict", *checkpoint.ENTRIES) if key != "config"} for state in states)
    )
    assert same(*(state["state_dict_ema"] for state in states))
    assert rows_in(tmp_path / "whole", "seconds") == rows_in(tmp_path / "cut", "seconds")


def trainer(*flags):
    return engine_trainer(configure("--batch-size", "240", "--time-steps", "1", *flags), batches=None)


def test_an_epoch_of_another_order_starts_again(warnings):
    first, other, saved = trainer("--epochs", "1"), trainer("--batch-size", "120"), []
    first.save = lambda: saved.append(first.state())
    first.stop_request.signal = signal.SIGTERM
    with pytest.raises(Stopped):
        first.train_epoch()
    other.restore(saved[0])
    assert (first.steps_done, other.steps_done) == (1, 0)
    named(warnings[0], "batch_size", 240, 120)
    first.steps_done = first.steps  # only the evaluation is left, which takes any batches
    other.restore(first.state())
    assert other.steps_done == other.steps == 11


def test_an_update_is_never_cut_in_two():
    saved = []
    one = trainer("--save-steps", "1", "--accum-iter", "2", "--epochs", "1")
    one.save = lambda: saved.append(one.steps_done)
    one.train_epoch()
    assert saved == [2, 4]


def test_a_second_interrupt_is_not_held_up():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, before)


def content(epoch):
    kinds = {"optimizer": {}, "scaler": {}, "position": {}, "best": {}, "config": {}}
    return kinds | {"state_dict": {"w": torch.arange(1000.0) + epoch}, "epoch": epoch}


def test_the_checkpoints_before_are_kept(tmp_path):
    path = tmp_path / "last.pt"
    for epoch in range(5):
        checkpoint.save(path, content(epoch), keep=2)
    checkpoint.save(path, content(5), keep=0)
    epochs = {file.name: checkpoint.read(file)["epoch"] for file in checkpoint.kept(path)}
    assert epochs == {"last.pt": 5, "last-1.pt": 3, "last-2.pt": 2}


@pytest.mark.parametrize("call", range(1, 7))
def test_killed_between_any_two_steps_of_a_save_there_is_a_whole_checkpoint(call, tmp_path, monkeypatch):
    path, left = tmp_path / "last.pt", call

    def dying(function):
        def call_or_die(*args, **kwargs):
            nonlocal left
            left -= 1
            if left <= 0:
                raise KeyboardInterrupt  # nothing catches it, as with SIGKILL
            return function(*args, **kwargs)

        return call_or_die

    for epoch in range(3):
        checkpoint.save(path, content(epoch), keep=2)
    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (os, "fsync"), (torch, "save")):
            patch.setattr(module, name, dying(getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, content(3), keep=2)
    epochs = [checkpoint.read(file)["epoch"] for file in checkpoint.kept(path)]
    assert epochs[0] in (2, 3)
    assert epochs == sorted(epochs, reverse=True)
    checkpoint.save(path, content(4), keep=2)
    assert [checkpoint.read(file)["epoch"] for file in checkpoint.kept(path)][:2] == [4, epochs[0]]


def test_layers_without_spikes_are_reported(warnings):
    model, images = trainer().model.eval(), torch.rand(4, 1, 8, 8)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.constant_(module.bias, 3)
    assert silent_layers(model, images) == []
    layers = ["stages.1.blocks.0.mlp.fc2.lif", "stages.2.blocks.0.mlp.fc1.lif"]
    for name in layers:
        bn = model.get_submodule(name.removesuffix(".lif")).bn
        torch.nn.init.zeros_(bn.weight), torch.nn.init.zeros_(bn.bias)
    assert silent_layers(model, images) == layers
    warn_of_silence(configure(), model, images)
    named(warnings[0], *layers)
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Check weights too, because the loss may stay finite: a NaN membrane never fires."""
    one = trainer("--epochs", "1")
    one.folder = tmp_path
    one.save(True)
    before = (tmp_path / "last.pt").read_bytes()
    with torch.no_grad():
        one.model.get_submodule("stages.1.blocks.0.mlp.fc1.conv").weight[0] = float("nan")
    with refuses("epoch 1"):
        one.save(True)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("torch.load", MemoryError()),
        ("torch.load", RuntimeError("can't allocate memory")),
        ("pathlib.Path.read_bytes", OSError(5, "Input/output error")),
    ],
)
def test_a_failure_of_the_machine_is_no_damage_to_a_checkpoint(place, error, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.pt", content(1))
    monkeypatch.setattr(place, Mock(side_effect=error))
    with pytest.raises(type(error)):  # not UserError, which would rename the file
        checkpoint.read(tmp_path / "last.pt")


def test_a_collapsed_loss_scale_ends_the_run():
    one = trainer("--epochs", "1")
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-11)
    with refuses("fp16", "epoch 1", "--amp bf16"):
        one.train_epoch()


@pytest.mark.parametrize(
    ("error", "values"),
    [
        (MemoryError(), ["--batch-size"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), ["--batch-size"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), ["--batch-size"]),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), ["--workers", "--resume"]),
        (OSError(28, "No space left on device"), ["No space left on device"]),
        (OSError(5, "Input/output error", "/data/a.jpg"), ["/data/a.jpg", "Input/output error"]),
    ],
)
def test_a_failure_of_the_machine_ends_in_one_line(error, values, capfd):
    with pytest.raises(SystemExit) as end, guard():
        raise error
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    named(line, *values)


def test_a_thread_that_cannot_write_prints_nothing_more(monkeypatch, capfd):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with guard():
        for error in (OSError(28, "No space left on device"), ValueError("ours")):
            thread = threading.Thread(target=Mock(side_effect=error))
            thread.start()
            thread.join()
    printed = capfd.readouterr().err
    assert "ValueError: ours" in printed
    assert "No space" not in printed


def test_bugs_are_not_hidden():
    with pytest.raises(RuntimeError, match="a shape is wrong"), guard():
        raise RuntimeError("a shape is wrong")


def test_weights_of_another_network_are_reported(tmp_path, monkeypatch, capfd):
    quick = "--batch-size 480 --epochs 1 --time-steps 1 --warmup-epochs 0".split()
    here(monkeypatch, capfd, "digits/train.py", *quick, "--ssa-membrane", "released", "--output-dir", tmp_path / "a")
    more = ["--time-steps", "2", "--finetune", tmp_path / "a/last.pt", "--output-dir", tmp_path / "b"]
    output = here(monkeypatch, capfd, "digits/train.py", *quick, *more)
    named(output, tmp_path / "a/last.pt", "ssa_membrane", "'released'", "'per_sample'", "time_steps")
    assert "residual" not in output


def test_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch, capfd):
    weights = trainer().model.state_dict()
    weights["stages.1.blocks.0.mlp.fc1.conv.weight"][0, 0] = float("inf")
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    line = fail(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "weights.pt")
    named(line, tmp_path / "weights.pt", "stages.1.blocks.0.mlp.fc1.conv.weight")


def test_skipped_samples_are_not_loaded():
    seen = []

    class Noting(list):
        def __getitem__(self, index):
            seen.append(index)
            return np.float32(index)

    feed = torch.utils.data.DataLoader(Noting(range(9)), 2, shuffle=True, drop_last=True)
    loader = TrainLoader(type("Device", (list,), {"loader": feed, "__iter__": lambda _: iter(feed)})(range(4)))
    epochs = []
    for first in (0, 3):
        torch.manual_seed(3)
        seen.clear()
        epochs.append([batch.tolist() for batch in loader.batches(0, first)])
    assert epochs[1] == epochs[0][3:]
    assert len(seen) == 2
    assert len(loader) == 4
