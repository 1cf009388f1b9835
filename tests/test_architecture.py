"""The architecture's figure says what the built network is."""

import re

import pytest
from scripts import ROOT, fail

from analysis.architecture import run
from models import create_model


def texts(path):
    """The figure's texts in order; where letters are drawn as outlines, matplotlib leaves each text as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(), re.S)


def lines(found):
    return [line for text in found for line in text.splitlines()]


def draw(folder, *flags):
    run(["--output-dir", str(folder), *flags])
    assert (folder / "architecture.png").exists()
    return texts(folder / "architecture.svg")


def parameters(module):
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


def assert_in_order(wanted, found):
    rest = iter(found)
    for text in wanted:
        assert text in rest, f"{text!r} is missing or out of order in {found}"


def test_imagenet(tmp_path):
    found = draw(tmp_path)
    model = create_model("qkformer_10_384")
    assert_in_order(["3 × 224 × 224", "56 × 56 tokens", "28 × 28 tokens", "14 × 14 tokens", "linear → 1000"], found)
    assert_in_order(["96 channels", "192 channels", "384 channels"], found)
    assert_in_order([parameters(stage) for stage in model.stages], found)
    assert_in_order(["1 block", "2 blocks", "7 blocks"], found)
    assert_in_order(["3×3 → 48 · pool · LIF", "3×3 → 96 · pool · LIF", "3×3 → 96 · LIF"], found)
    assert_in_order(["stages 1, 2", "not in this network", "stage 3"], found)
    assert {"MLP 96 → 384 → 96", "MLP 384 → 1536 → 384", "shown T = 4 times"} <= set(found)
    assert "16.47 M parameters,  residuals add spikes (SEW)" in found
    assert_in_order(["6 heads of 16 channels", "6 heads of 32 channels", "6 heads of 64 channels"], lines(found))


def test_event_frames_ms_residuals_and_other_attentions(tmp_path):
    flags = "--model qkformer_2_256 --residual ms --attention channel token --time-steps 5 --num-classes 11"
    found = draw(tmp_path, *flags.split())
    assert_in_order(["5 event frames", "2 × 128 × 128", "16 × 16 tokens", "8 × 8 tokens", "linear → 11"], found)
    assert_in_order(["128 channels", "256 channels"], found)
    assert_in_order(["3×3 → 64 · pool · LIF", "3×3 → 128 · pool", "1×1 → 128, ↓4"], found)  # in currents
    assert_in_order(["Q-K channel attention", "Q-K token attention"], lines(found))
    assert_in_order(["stage 2", "stage 1", "not in this network"], found[-50:])


def test_the_figure_of_the_readme_is_the_default(tmp_path):
    assert draw(tmp_path) == texts(ROOT / "docs/architecture.svg")
    draw(tmp_path / "again")
    assert (tmp_path / "again/architecture.svg").read_bytes() == (tmp_path / "architecture.svg").read_bytes()


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("--model qkformer_10_385", "qkformer_10_385"),
        ("--attention token self", "attention"),
        ("--input-size 0", "--input-size"),
        ("--model spikformer_2_256", "spikformer_2_256"),
        ("--size 3", "--size"),
    ],
)
def test_mistakes_end_in_one_line(monkeypatch, capfd, tmp_path, flags, value):
    assert value in fail(monkeypatch, capfd, "analysis.architecture", *flags.split(), "--output-dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()
