"""What the other tests count is noticed where it happens."""

import pytest
import torch
from chains import Chain
from harness import Counts, Death, same

from engine import checkpoint, run
from engine.cli import UserError


def refuse(message):
    raise UserError(message)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (lambda: 1 / 0, "tracebacks"),
        (lambda: refuse(""), "wrong"),
        (lambda: refuse("no"), None),
    ],
)
def test_trials(body, kind):
    counts = Counts()
    with counts.trial("this"):
        body()
    assert (counts.trials, [note.split(":")[0] for note in counts.notes]) == (1, [kind] if kind else [])


@pytest.mark.parametrize(
    ("save", "expected", "kind"),
    [
        (lambda *_: 1 / 0, {0}, "tracebacks"),
        (lambda *_: refuse("no"), {0}, "wrong"),
        (lambda *_: refuse("no"), {2}, None),
    ],
)
def test_scripts(save, expected, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "create_data", save)
    counts = Counts()
    counts.script("digits/train.py", "--output-dir", tmp_path, expected=expected)
    assert [note.split(":")[0] for note in counts.notes][:1] == ([kind] if kind else [])


def test_contents_are_compared_to_the_bit():
    ours = {"a": [torch.zeros(2), 1.0, float("nan")], "b": None}
    assert same(ours, {"a": [torch.zeros(2), 1.0, float("nan")], "b": None})
    for other in (-torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(1, 2), torch.tensor([0, 1e-45])):
        assert not same(ours, {"a": [other, 1.0, float("nan")], "b": None})
    assert not same(ours, {"a": ours["a"]})


@pytest.mark.parametrize(
    ("death", "left"),
    [
        (Death(2), ["last.pt.tmp"]),  # before it is synced
        (Death(3), ["last.pt.tmp"]),  # before it is renamed
        (Death(4), ["last.pt"]),  # before the folder is synced
        (Death(2, size=100_000), ["last.pt", "last.pt.tmp"]),
    ],
)
def test_deaths_in_a_save(death, left, tmp_path, whole):
    """Each is where it is said to be; a second save keeps the first."""
    folder = tmp_path / "run"
    counts = Counts()
    chain = Chain(counts, folder, whole(1))
    chain.life(death)
    assert counts.notes == []
    assert counts.kills == 1
    assert sorted(path.name for path in folder.glob("*.pt*")) == left
    if death.size:
        assert (folder / "last.pt.tmp").stat().st_size == death.size
    if "last.pt" in left:
        assert checkpoint.read(folder / "last.pt")["epoch"] == 0
