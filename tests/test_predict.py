"""Answers of engine.predict: equal to those of the test set's loader, with settings from the checkpoint."""

import contextlib
import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_data
import torch
from first_step import calibrated
from scripts import ROOT, fail, here, named, refuses
from test_event_folder import folder
from tqdm.contrib.logging import logging_redirect_tqdm

from engine import checkpoint, config, log, predict, world
from engine.config import LOCAL_FIELDS, plain
from engine.data.frames import DECODERS
from engine.run import build_model, create_data
from engine.weights import warn_of_silence

IMAGES = "--model qkformer_3_64 --num-classes 3 --input-size 16 --crop-pct 0.8 --hflip 0 --workers 0".split()
EVENTS = "--dataset eventfolder --model qkformer_2_64 --num-classes 3 --input-size 34 --workers 0".split()
EVENTS += ["--time-steps", "4"]


def make(path, recipe, flags, root, **entries):
    """Write the checkpoint of a spiking network, and the record of its data; return network and test set."""
    cfg = config.load(ROOT / recipe, [*flags, "--data-path", str(root), "--eval-batch-size", "3"])
    data = create_data(cfg, world.setup("cpu"), train=False)
    torch.manual_seed(0)
    model = calibrated(build_model(cfg), torch.cat([x for x, _ in data.test])).eval()
    state = {key: {} for key in checkpoint.ENTRIES} | {"epoch": 1, "state_dict": model.state_dict()}
    checkpoint.save(path, state | {"config": plain(cfg, without=LOCAL_FIELDS), **entries})
    return model, data


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write a folder of images and a checkpoint with its classes."""
    root = tmp_path_factory.mktemp("images")
    tiny_data.image_folder(root / "data", classes=3, train=1, test=3, size=24)
    return root, *make(root / "best.pt", "imagenet/own_images.yml", IMAGES, root / "data", classes=["a", "b", "c"])


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings")
    folder(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("joblib.cpu_count", lambda: 1)
        return root, *make(root / "best.pt", "cifar10-dvs/cifar10-dvs.yml", EVENTS, root / "data")


def expected(model, data):
    """Return the probabilities of each test sample, in the loader's batches."""
    with torch.inference_mode():
        return torch.cat([model(x).softmax(1) for x, _ in data.test])


def assert_answers(answers, probabilities, classes):
    assert len(answers) == len(probabilities)
    for answer, row in zip(answers, probabilities, strict=True):
        assert sum(p for _, p in answer) == pytest.approx(1, abs=1e-5)  # the top five hold all three classes
        assert [p for _, p in answer] == sorted((p for _, p in answer), reverse=True)
        assert dict(answer) == {name: pytest.approx(p, abs=1e-5) for name, p in zip(classes, row.tolist(), strict=True)}
    assert (probabilities - 1 / len(classes)).abs().max() > 0.001


def test_answers_are_those_of_the_test_set(images, recordings):
    for (root, model, data), classes, files in (
        (images, ["a", "b", "c"], images[2].test.loader.dataset.samples),
        (recordings, ["0", "1", "2"], None),  # of a checkpoint that records no names
    ):
        assert expected(model, data).std(0).max() > 0.001
        paths = [path for path, _ in files] if files else sorted((root / "data/test").rglob("*.npz"))
        predictor = predict.load(root / "best.pt", device="cpu")
        assert_answers(predictor(paths), expected(model, data), classes)
        assert_answers(predictor(torch.cat([x for x, _ in data.test])), expected(model, data), classes)


def test_a_folder_is_answered_but_for_unreadable_files(images, tmp_path, monkeypatch, capfd):
    root, model, data = images
    files = tmp_path / "files"
    paths = [Path(path) for path, _ in data.test.loader.dataset.samples]
    for i, path in enumerate(paths):
        (files / f"{i}").mkdir(parents=True)
        shutil.copy(path, files / f"{i}")
    for name in ("._0.png", "note.txt", "zz.png"):
        (files / name).write_bytes(b"no image")
    table, answers, picture = (tmp_path / f"out/answers.{kind}" for kind in ("csv", "json", "png"))
    flags = ["--csv", table, "--json", answers, "--picture", picture, "--device", "cpu", "--workers", "2"]
    line = fail(monkeypatch, capfd, "engine.predict", files, *flags, "--checkpoint", root / "best.pt")
    named(line, "1 of 11")
    rows = json.loads(answers.read_text())
    with table.open() as file:
        assert [{k: str(v) for k, v in row.items()} for row in rows] == list(csv.DictReader(file))
    predicted = [[(row["class"], row["probability"]) for row in rows[i : i + 3]] for i in range(0, len(rows), 3)]
    assert_answers(predicted, expected(model, data), ["a", "b", "c"])
    assert [Path(row["file"]).name for row in rows[::3]] == [path.name for path in paths]
    assert picture.exists()


def test_a_recording_is_answered_frame_by_frame(recordings, monkeypatch, capfd):
    root, model, data = recordings
    (path, *others) = sorted((root / "data/test").rglob("*.npz"))
    files = predict._files_in([root / "data"], tuple(DECODERS))
    assert {path, *others} <= set(files)
    assert not any(file.suffix == ".npy" for file in files)  # the frames that the evaluation kept there
    out = here(monkeypatch, capfd, "engine.predict", "--checkpoint", root / "best.pt", "--stream", path).splitlines()
    out = [line for line in out if not line.startswith("warning")]
    assert [line.split(":")[0].split()[-1] for line in out] == ["1/4", "2/4", "3/4", "4/4"]
    predictor = predict.load(root / "best.pt", device="cpu")
    *_, last = predictor.stream(predictor.read(path))
    assert_answers([last, *predictor([path])], expected(model, data)[[0, 0]], ["0", "1", "2"])


def test_what_cannot_be_answered_is_refused(images, tmp_path, monkeypatch, capfd):
    root, model, data = images
    common = ["engine.predict", "--device", "cpu", "--checkpoint"]
    named(fail(monkeypatch, capfd, *common, root / "best.pt", "--stream", "x.png"), "--stream")
    named(fail(monkeypatch, capfd, *common, root / "best.pt", tmp_path), tmp_path)
    named(fail(monkeypatch, capfd, *common, root / "best.pt", "no.png"), "no.png")
    photo, taken = tmp_path / "photo.png", tmp_path / "taken.pt"
    photo.write_bytes(Path(data.test.loader.dataset.samples[0][0]).read_bytes())
    taken.write_bytes((root / "best.pt").read_bytes())
    contents = [photo.read_bytes(), taken.read_bytes()]
    named(fail(monkeypatch, capfd, *common, taken, photo, "--csv", photo), photo)
    named(fail(monkeypatch, capfd, *common, taken, photo, "--json", taken), taken)
    named(fail(monkeypatch, capfd, *common, taken, photo, "--csv", tmp_path / "x", "--json", tmp_path / "x"), "x")
    named(fail(monkeypatch, capfd, *common, taken, photo, "--picture", tmp_path / "x.xyz"), "x.xyz")
    assert contents == [photo.read_bytes(), taken.read_bytes()]
    with refuses("x.png"):
        predict.load(root / "best.pt", device="cpu")([tmp_path / "x.png"])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with refuses(tmp_path / "weights.pt", "--config"):
        predict.load(tmp_path / "weights.pt")
    flags = {"input_size": 16, "crop_pct": 0.8, "eval_batch_size": 3}
    other = predict.load(tmp_path / "weights.pt", "cpu", config=str(ROOT / "imagenet/own_images.yml"), **flags)
    paths = [path for path, _ in data.test.loader.dataset.samples]
    assert_answers(other(paths), expected(model, data), ["0", "1", "2"])
    make(tmp_path / "bad.pt", "imagenet/own_images.yml", IMAGES, root / "data", classes=7)
    with refuses(tmp_path / "bad.pt"):
        predict.load(tmp_path / "bad.pt")


def test_a_run_on_a_folder_records_classes_and_data(images, tmp_path, monkeypatch, capfd):
    """Count classes with `num_classes: null`; test.py finds data whose path was relative to another folder."""
    root, small = images[0], [*IMAGES[:2], *IMAGES[4:], "--time-steps", "1", "--epochs", "1", "--warmup-epochs", "0"]
    small += ["--batch-size", "2"]
    monkeypatch.chdir(root)
    run = ["imagenet/train.py", "--config", "own_images", "--data-path", "data", "--output-dir", tmp_path / "run"]
    here(monkeypatch, capfd, *run, *small)
    state = checkpoint.read(tmp_path / "run/last.pt")
    assert (state["config"]["num_classes"], state["classes"]) == (3, [f"n{i:08d}" for i in range(3)])
    monkeypatch.chdir(tmp_path)
    for script in ("imagenet/test.py", "cifar10/test.py"):
        out = here(monkeypatch, capfd, script, "--checkpoint", "run/best.pt")
        named(out, "on 10 samples", root / "data")
    two = tiny_data.image_folder(tmp_path / "two", classes=2, train=1, test=1)
    line = fail(monkeypatch, capfd, "imagenet/test.py", "--checkpoint", "run/best.pt", "--data-path", two)
    named(line, two, "has 2")
    assert "--num-classes" not in line  # which would not fit the weights
    here(monkeypatch, capfd, run[0], *run[-2:], *small, "--resume", "auto", "--epochs", "2")


def test_a_reader_that_stops_reading_leaves_no_traceback(monkeypatch, capfd):
    """Close the pipe as `python -m engine.predict ... | head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", pipe)
        log.setup_console(is_main=True)
        with logging_redirect_tqdm([log.logger]):
            log.logger.info("unread")
        with contextlib.suppress(BrokenPipeError):
            pipe.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
    assert capfd.readouterr().err == ""


def test_silence_of_few_updates_is_explained(warnings):
    model = build_model(cfg := config.load(ROOT / "digits/digits.yml"))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(25)
    warn_of_silence(cfg, model, torch.rand(4, 1, 8, 8))
    named(warnings[-1], 25)


def test_a_silent_network_is_named(images, tmp_path, monkeypatch, capfd):
    state = torch.load(images[0] / "best.pt")
    for name, value in state["state_dict"].items():
        if name.endswith("running_var"):
            value.fill_(1e9)
    torch.save(state, tmp_path / "silent.pt")
    out = here(monkeypatch, capfd, "engine.predict", "--checkpoint", tmp_path / "silent.pt", ROOT / "docs/digit.png")
    assert "warning: stages." in out
