"""Reading every checkpoint format, and refusing what is not plain data."""

import argparse
import collections
import os
import pickle
from pathlib import Path

import pytest
import torch
from scripts import refuses

from engine import checkpoint
from models import create_model
from models.released import load_released, to_released


def training_state(name, **kwargs):
    """A model under released names after one optimizer step, with all that a script would save beside it."""
    model = create_model(name, num_classes=4, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    shape = (2, 3, 32, 32) if model.in_channels == 3 else (2, 2, 2, 32, 32)
    scaler.scale(model(torch.randn(shape)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    args = argparse.Namespace(model=name, lr=1e-3, mean=(0.1, 0.2), resume=None, amp=True)
    weights = collections.OrderedDict(to_released(model))
    return model, weights, optimizer.state_dict(), scaler.state_dict(), schedule.state_dict(), args


def imagenet_file(path):
    model, weights, optimizer, scaler, _, args = training_state("qkformer_10_384")
    torch.save({"model": weights, "optimizer": optimizer, "epoch": 199, "scaler": scaler, "args": args}, path)
    return model, {"epoch": 199}


def cifar_file(path):
    model, weights, optimizer, scaler, _, args = training_state("qkformer_3_64", in_channels=3)
    content = {"epoch": 400, "arch": "QKFormer", "state_dict": weights, "optimizer": optimizer, "version": 2}
    torch.save({**content, "args": args, "amp_scaler": scaler, "metric": 96.21}, path)
    return model, {"epoch": 400, "metric": 96.21}


def dvs_file(path):
    model, weights, optimizer, _, schedule, args = training_state("qkformer_2_64")
    content = {"model": weights, "optimizer": optimizer, "lr_scheduler": schedule, "epoch": 90}
    torch.save({**content, "args": args, "max_test_acc1": 84.1, "test_acc5_at_max_test_acc1": 98.0}, path)
    return model, {"epoch": 90, "max_test_acc1": 84.1}


def ms_file(path, key="state_dict"):
    model, weights, *_ = training_state("qkformer_10_384", residual="ms")
    torch.save({key: weights} if key else weights, path)
    return model, {}


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (imagenet_file, "imagenet"),
        (cifar_file, "cifar"),
        (dvs_file, "dvs"),
        (ms_file, "weights"),
        (lambda path: ms_file(path, key=None), "weights"),
    ],
    ids=["imagenet", "cifar", "dvs", "ms", "ms-bare"],
)
def test_released_formats(tmp_path, write, kind):
    model, entries = write(tmp_path / "file.pth")
    state = checkpoint.read(tmp_path / "file.pth")
    assert state["format"] == kind
    assert {key: state[key] for key in entries} == entries
    if "args" in state:
        assert state["args"].lr == 1e-3
        assert state["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0
    kwargs = {"residual": model.residual, "num_classes": 4, "in_channels": model.in_channels}
    name = {"imagenet": "qkformer_10_384", "cifar": "qkformer_3_64", "dvs": "qkformer_2_64"}[model.family]
    fresh = create_model(name, **kwargs)
    load_released(fresh, state["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])  # of timm's scripts, of DeiT's
@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict"])
def test_entries_that_other_projects_use(tmp_path, key, averaged):
    weights, average = {"module.head.weight": torch.zeros(2)}, {"module.head.weight": torch.ones(2)}
    torch.save({key: weights, averaged: average, "epoch": 3, "arch": "resnet18"}, tmp_path / "file.pth")
    state = checkpoint.read(tmp_path / "file.pth")
    assert (state["epoch"], *map(list, (state["state_dict"], state["state_dict_ema"]))) == (
        3,
        list(weights),
        list(average),
    )
    assert state["state_dict_ema"]["module.head.weight"].all()
    torch.save({key: weights, averaged: {"decay": 0.9}}, tmp_path / "file.pth")
    with refuses("state_dict_ema"):
        checkpoint.read(tmp_path / "file.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["PAYLOAD_MARK"],)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["args", "model", "top"])
def test_a_malicious_pickle_is_refused_unread(tmp_path, monkeypatch, place, legacy):
    mark = tmp_path / "ran"
    monkeypatch.setenv("PAYLOAD_MARK", str(mark))
    weights = {"head.weight": torch.zeros(2)}
    content = {
        "args": {"model": weights, "args": argparse.Namespace(x=Payload())},
        "model": {"model": weights | {"extra": Payload()}},
        "top": Payload(),
    }[place]
    path = tmp_path / "evil.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with refuses(path, f"{os.system.__module__}.system"):
        checkpoint.read(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload()))  # the payload does work where it is let in
    assert mark.exists()


def _truncated(path):
    cifar_file(path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("write", "values"),
    [
        (lambda path: None, []),
        (lambda path: path.mkdir(), []),
        (lambda path: path.symlink_to(path), []),
        (lambda path: path.write_bytes(pickle.dumps({"model": Path()}, 4)), []),
        (lambda path: path.write_bytes(b""), []),
        (lambda path: path.write_text("<html>quota exceeded</html>"), []),
        (_truncated, []),
        (lambda path: torch.save([1, 2], path), ["list"]),
        (lambda path: torch.save({"model": torch.nn.Linear(2, 2)}, path), ["torch.nn.modules.linear.Linear"]),
        (lambda path: torch.save({"epoch": 3, "note": "x"}, path), ["epoch", "note"]),
        (lambda path: torch.save({"model": {}}, path), ["model"]),
        (lambda path: torch.save({}, path), []),
        (
            lambda path: checkpoint.save(path, {"state_dict": {}, "epoch": 1}),
            ["optimizer", "scaler", "best", "config"],
        ),
        (
            lambda path: checkpoint.save(path, {key: [1] for key in ("state_dict", *checkpoint.ENTRIES)}),
            ["optimizer", "scaler", "position", "best", "config", "epoch"],
        ),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, write, values):
    write(tmp_path / "file.pth")
    with refuses(tmp_path / "file.pth", *values):
        checkpoint.read(tmp_path / "file.pth")
