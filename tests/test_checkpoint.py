"""Reading of every checkpoint format, and errors for anything but plain data."""

import argparse
import collections
import os
import pickle
from pathlib import Path

import pytest
import torch
from scripts import refuses
from tiny_data import Payload

from engine import checkpoint
from models import create_model
from models.released import load_released, to_released


def training_state(name, **kwargs):
    """Return a model after one optimizer step, and its entries in released files."""
    model = create_model(name, num_classes=4, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    shape = (2, 3, 32, 32) if model.in_channels == 3 else (2, 2, 2, 32, 32)
    scaler.scale(model(torch.randn(shape)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return model, {
        "model": collections.OrderedDict(to_released(model)),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "args": argparse.Namespace(model=name, lr=1e-3, mean=(0.1, 0.2), resume=None, amp=True),
    }


FORMATS = {  # format -> network, entry of the file -> entry of `training_state`, figures
    "imagenet": ("qkformer_10_384", {}, "model optimizer scaler args", {"epoch": 199}),
    "cifar": (
        "qkformer_3_64",
        {"in_channels": 3},
        "state_dict=model optimizer amp_scaler=scaler args",
        {"epoch": 400, "metric": 96.21, "arch": "QKFormer", "version": 2},
    ),
    "dvs": ("qkformer_2_64", {}, "model optimizer lr_scheduler args", {"epoch": 90, "max_test_acc1": 84.1}),
    "weights": ("qkformer_10_384", {"residual": "ms"}, "state_dict=model", {}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_released_formats(tmp_path, kind):
    name, arguments, entries, figures = FORMATS[kind]
    model, content = training_state(name, **arguments)
    pairs = (entry.split("=") for entry in entries.split())
    torch.save(figures | {pair[0]: content[pair[-1]] for pair in pairs}, tmp_path / "file.pth")
    state = checkpoint.read(tmp_path / "file.pth")
    assert state["format"] == kind
    shown = {"epoch", "metric", "max_test_acc1"} & figures.keys()
    assert {key: state[key] for key in shown} == {key: figures[key] for key in shown}
    if "args" in entries:
        assert state["args"].lr == 1e-3
        assert state["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0
    fresh = create_model(name, num_classes=4, **arguments)
    load_released(fresh, state["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))
    torch.save(content["model"], tmp_path / "bare.pth")
    assert checkpoint.read(tmp_path / "bare.pth")["format"] == "weights"


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


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["args", "model", "top"])
def test_a_malicious_pickle_is_refused_unread(tmp_path, mark, place, legacy):
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
    pickle.loads(pickle.dumps(Payload()))  # the payload works if something unpickles it
    assert mark.exists()


def cut(path):
    torch.save({"state_dict": {"head.weight": torch.zeros(500, 2)}}, path)
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
        (cut, []),
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
def test_bad_files_are_reported_in_one_line(tmp_path, write, values):
    write(tmp_path / "file.pth")
    with refuses(tmp_path / "file.pth", *values):
        checkpoint.read(tmp_path / "file.pth")
