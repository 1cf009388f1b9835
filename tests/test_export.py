"""Exported networks give torch's results, and their files load again."""

import json
import os
import re
import sys
from unittest.mock import Mock

import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import save, save_file
from scripts import ROOT, fail, here, named, refuses, result_in
from spikingjelly.activation_based.monitor import OutputMonitor
from test_analysis import untrained

from analysis import common, export
from analysis.onnx_graph import Parity, _follow
from engine import checkpoint, config, predict
from engine.config import plain
from models import LIF, create_model

UNIT = "stages.0.embed.units.0."


def exported(path, *flags):
    """Export to ONNX; return a session of the file, and both graphs."""
    with pytest.MonkeyPatch.context() as patch:
        graphs, to_onnx = [], export.to_onnx
        patch.setattr(export, "to_onnx", lambda *args: graphs.append(to_onnx(*args)) or graphs[0])
        export.run(["--checkpoint", str(path), "--format", "onnx", *map(str, flags)])
    return onnxruntime.InferenceSession(path.with_suffix(".onnx")), graphs[0]


def export_safetensors(path, *flags):
    export.run(["--checkpoint", str(path), "--format", "safetensors", *map(str, flags)])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Export a network of which one channel is exactly at its threshold, where it fires."""
    path = tmp_path_factory.mktemp("digits") / "best.pt"
    untrained(path, "digits/digits.yml", "--time-steps", "1", "--attention", "token,channel,self")
    state = torch.load(path)
    state["state_dict"][UNIT + "conv.weight"][0] = 0
    state["state_dict"][UNIT + "bn.bias"][0] = 2.0
    torch.save(state, path)
    return path, *exported(path, "--samples", "16")


def test_digits_at_any_batch(digits):
    path, session, _ = digits
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    assert [output.name for output in session.get_outputs()] == ["logits"]
    subject = common.subject(path, [])
    x, _ = subject.samples(5)
    with torch.no_grad():
        expected = subject.model(x)
    assert expected.std(0).max() > 0.01  # the answers differ between samples
    (logits,) = session.run(None, {"input": x.numpy()})
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-5
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["settings"])["attention"] == ["token", "channel", "self"]
    assert json.loads(about["mean"]) == [0.305]
    assert json.loads(about["classes"]) == [str(i) for i in range(10)]
    content = path.with_suffix(".onnx").read_bytes()
    assert str(ROOT).encode() not in content
    assert b"Scatter" not in content
    assert b"Sigmoid" not in content  # of surrogate gradients


def test_a_spike_within_rounding_of_the_threshold_is_explained(digits):
    """Moving a neuron away from its threshold gives a flip at first, then an error."""
    path, _, graph = digits
    subject = common.subject(path, [])
    x, _ = subject.samples(3)
    bias = subject.model.get_parameter(UNIT + "bn.bias").data
    bias[0] -= 2e-6
    parity = export.compare(subject.model, graph, x.split(1))
    assert parity.flips.tolist() == [8 * 8] * 3  # of one channel, in each sample
    assert parity.difference.min() > 1e-5 > parity.followed.max()
    assert 0 < parity.distance < 2e-6
    parity.require()
    bias[0] -= 1e-3
    with refuses("5.0e-04"):
        export.compare(subject.model, graph, x.split(1)).require()
    bias[0] += 1e-3
    subject.model.head.bias.data += 1e-4
    with refuses("1e-05", "1.0e-04"):
        export.compare(subject.model, graph, x.split(1)).require()


@pytest.mark.parametrize("changes", [{"neuron": "if"}, {"neuron": "plif"}, {"tau": 1.5}], ids=str)
def test_every_neuron_follows_its_own_spikes(changes):
    torch.manual_seed(0)
    model, x = create_model("qkformer_3_64", **changes), 2 * torch.randn(3, 1, 8, 8)
    spikes = OutputMonitor(model, LIF)
    expected = model(x)  # in training mode, where a new network spikes
    spikes.disable()
    given = {name: rows[0] for name in spikes.monitored_layers if (rows := spikes[name])}
    assert sum(bool(value.any()) for value in given.values()) > len(given) / 2
    logits, flips, distance = _follow(model, x, given)
    assert torch.equal(logits, expected)
    assert (flips.tolist(), distance) == ([0, 0, 0], 0)


def test_a_leaking_membrane_is_exported_at_a_batch_of_1(tmp_path, monkeypatch):
    path = untrained(tmp_path / "best.pt", "digits/digits.yml", "--ssa-membrane", "released")
    batches = []
    monkeypatch.setattr(export, "to_onnx", lambda model, x, batch, metadata: batches.append(batch) or Mock())
    monkeypatch.setattr(export, "compare", Mock())
    monkeypatch.setattr(export, "_write", Mock())
    export.run(["--checkpoint", str(path), "--format", "onnx"])
    assert batches == [1]
    with refuses("--batch 2", "--ssa-membrane"):
        export.run(["--checkpoint", str(path), "--format", "onnx", "--batch", "2"])


def test_a_difference_without_a_spike_that_explains_it_is_refused():
    parity = Parity(torch.tensor([0.0, 0.1]), torch.tensor([True, True]), torch.zeros(2), torch.tensor([0, 1]), 1e-7, 9)
    parity.require()
    with refuses(1, 2):
        parity._replace(flips=torch.tensor([1, 0])).require()


@pytest.mark.slow
def test_event_frames_with_membrane_shortcuts(tmp_path):
    flags = ["--time-steps", "2", "--residual", "ms", "--attention", "channel,self"]
    path = untrained(tmp_path / "best.pt", "digits-dvs/digits-dvs.yml", *flags)
    session, _ = exported(path, "--samples", "4", "--batch", "2")
    assert session.get_inputs()[0].shape == [2, 2, 2, 32, 32]
    about = session.get_modelmeta().custom_metadata_map
    assert "[B,T,C,H,W]" in about["input"]
    assert "mean" not in about


def test_safetensors_evaluate_as_the_checkpoint_and_are_not_resumed(tmp_path, monkeypatch, capfd):
    flags = ["--attention", "channel", "token", "self", "--time-steps", "1", "--mean", "0.1", "--input-size", "9"]
    path = untrained(tmp_path / "best.pt", "digits/digits.yml", *flags)
    names = [f"digit {i}" for i in range(10)]
    checkpoint.save(path, checkpoint.read(path) | {"classes": names})
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", path)
    expected = result_in(tmp_path)
    output = tmp_path / "out/mine.safetensors"
    export_safetensors(path, "--output", output)
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", output)
    actual = result_in(tmp_path / "out")
    for key in ("top1", "loss", "count", "attention", "time_steps", "mean", "input_size", "lr"):
        assert actual[key] == expected[key]
    assert checkpoint.read(output)["classes"] == predict.load(output, "cpu").classes == names

    card = output.with_suffix(".md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == round(expected["top1"], 2)
    assert (front["datasets"], "license" in front) == (["digits"], False)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(output.parent)
    namespace = {}
    exec(code, namespace)
    weights = checkpoint.read(path)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in namespace["model"].state_dict().items())

    line = fail(monkeypatch, capfd, "digits/train.py", "--resume", output, "--output-dir", tmp_path / "new")
    named(line, output)


def test_safetensors_of_weights_without_a_record_are_no_run_of_the_recipe(tmp_path, monkeypatch, capfd):
    path, output = untrained(tmp_path / "best.pt", "digits/digits.yml"), tmp_path / "foreign.safetensors"
    torch.save({"model": checkpoint.read(path)["state_dict"]}, tmp_path / "foreign.pth")
    export_safetensors(tmp_path / "foreign.pth", "--config", "digits/digits.yml", "--output", output)
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", output)
    assert result_in(tmp_path)["epochs"] == 0


def test_safetensors_keep_the_names_of_classes_and_event_folders_need_no_recipe(tmp_path):
    flags = ["--dataset", "eventfolder", "--num-classes", "2"]
    path = untrained(tmp_path / "best.pt", "cifar10-dvs/cifar10-dvs.yml", *flags)
    torch.save(torch.load(path) | {"classes": ["left", "right"]}, path)
    export.run(["--checkpoint", str(path), "--format", "safetensors"])
    state = checkpoint.read(path.with_suffix(".safetensors"))
    assert (state["classes"], state["config"]["dataset"]) == (["left", "right"], "eventfolder")


def test_a_card_has_no_accuracy_that_was_not_measured(tmp_path):
    path, record = untrained(tmp_path / "best.pt", "digits/digits.yml"), tmp_path / "best.test.json"
    result = {"top1": 12.34, "time": "", "count": 360, **plain(config.load(ROOT / "digits/digits.yml"), ["energy"])}
    is_earlier = (0, 0)  # the record is of another checkpoint of this name
    for measured, times, has_accuracy in (
        (None, None, False),
        (result, None, True),
        (result, is_earlier, False),
        (result | {"time_steps": 2}, None, False),
        ({"top1": 99}, None, False),
    ):
        if measured:
            record.write_text(json.dumps(measured))
            os.utime(record, times)
        export_safetensors(path)
        card = (tmp_path / "best.md").read_text()
        assert ("12.34" in card, "model-index" in card) == (has_accuracy, has_accuracy)


def test_the_card_of_a_rival_builds_it(tmp_path, monkeypatch):
    path = untrained(tmp_path / "best.pt", "digits/digits.yml", "--model", "spikformer_3_64", "--time-steps", "1")
    export_safetensors(path)
    (code,) = re.findall(r"```python\n(.*?)```", path.with_suffix(".md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, namespace := {})
    assert namespace["model"].family == "spikformer"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: torch.save({"a": torch.zeros(2)}, path),
        lambda path: path.write_bytes(save({"a": torch.zeros(2000)})[:-100]),
        lambda path: save_file({"a": torch.zeros(2)}, path, {"config": "{"}),
        lambda path: save_file({"a": torch.zeros(2)}, path, {"config": "[1]"}),
        lambda path: save_file({"a": torch.zeros(2)}, path),
    ],
)
def test_damaged_and_foreign_safetensors_are_refused(tmp_path, monkeypatch, capfd, write):
    write(tmp_path / "file.safetensors")
    line = fail(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "file.safetensors")
    named(line, "file.safetensors")


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--format", "onnx"], "--checkpoint"),
        (["--format", "tflite", "--checkpoint", "x.pt"], "tflite"),
        (["--format", "onnx", "--checkpoint", "no.pt"], "no.pt"),
        (["--format", "onnx", "--checkpoint", "no.pt", "--batch", "0"], "--batch"),
        (["--format", "onnx", "--checkpoint", "no.pt", "--output", "x.bin"], "--output x.bin"),
        (["--format", "safetensors", "--checkpoint", "x.safetensors"], "safetensors"),
    ],
)
def test_mistakes_are_reported(monkeypatch, capfd, flags, value):
    named(fail(monkeypatch, capfd, "analysis.export", *flags), value)


def test_a_file_that_is_no_card_is_kept(tmp_path):
    path = untrained(tmp_path / "best.pt", "digits/digits.yml")
    (tmp_path / "best.md").write_text("# mine")
    with refuses(tmp_path / "best.md"):
        export_safetensors(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.md", "best.pt"]


def test_a_missing_package_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with refuses("onnxscript"):
        export.run(["--checkpoint", "no.pt", "--format", "onnx"])
