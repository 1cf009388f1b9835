"""Event data sets through the scripts, from raw recordings to accuracy."""

import json

import numpy as np
import pytest
import torch
from scripts import fail, here, named, ranks, result_in, rows_in, succeed
from tiny_data import cifar10_dvs, dvs128_gesture

import engine.run
from engine.data import digits, pictures
from engine.data.frames import Layout

TINY = "--epochs 2 --warmup-epochs 0 --cooldown-epochs 0 --time-steps 2 --batch-size 4 --workers 0 --threads 1".split()


def test_a_shuffled_split_goes_with_the_run(tmp_path, one_core, monkeypatch, capfd):
    cifar10_dvs(tmp_path / "data", per_class=2, count=50)
    flags = ["--data-path", tmp_path / "data", *TINY, "--epochs", "1", "--batch-size", "10", "--time-steps", "1"]
    train = ["cifar10-dvs/train.py", *flags, "--output-dir", tmp_path / "run"]
    here(monkeypatch, capfd, *train, "--split-seed", "3")
    split = json.loads((tmp_path / "run/split.json").read_text())
    test = ["cifar10-dvs/test.py", "--data-path", tmp_path / "data", "--checkpoint", tmp_path / "run/last.pt"]
    unwarned = here(monkeypatch, capfd, *test)
    assert result_in(tmp_path / "run")["split_seed"] == 3
    warned = here(monkeypatch, capfd, *test, "--split-seed", "4")
    assert len(warned.splitlines()) > len(unwarned.splitlines())
    assert str(tmp_path / "run/last.pt") in " ".join(line for line in warned.splitlines() if "warning" in line)
    record = tmp_path / "run/split.json"
    for content in ("5", '{"train": 5}', '{"train": [["a"]], "test": []}', "{"):
        record.write_text(content)
        named(fail(monkeypatch, capfd, *test), record)
    split["test"].pop()
    record.write_text(json.dumps(split))
    named(fail(monkeypatch, capfd, *train, "--epochs", "2", "--resume", "auto"), record)


def test_a_checkpoint_of_other_data_is_evaluated_on_them(tmp_path, monkeypatch, capfd):
    flags = [*TINY, "--epochs", "1", "--batch-size", "1400", "--time-steps", "1", "--output-dir", tmp_path]
    here(monkeypatch, capfd, "digits-dvs/train.py", *flags)
    said = here(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "last.pt", "--workers", 0)
    named(said, tmp_path / "last.pt", "digits-dvs")
    assert result_in(tmp_path)["dataset"] == "digits-dvs"
    here(monkeypatch, capfd, "cifar10-dvs/test.py", "--checkpoint", tmp_path / "last.pt", "--workers", 0)
    assert result_in(tmp_path)["data_path"] is None  # not that of the recipe of other data
    other = ["cifar10-dvs/test.py", "--checkpoint", tmp_path / "last.pt", "--data-path", tmp_path]
    named(fail(monkeypatch, capfd, *other), "data_path", tmp_path, "digits-dvs")
    longer = ["--output-dir", tmp_path, "--resume", "auto", "--epochs", "2", "--workers", "0"]
    named(here(monkeypatch, capfd, "cifar10-dvs/train.py", *longer), tmp_path / "last.pt", "digits-dvs")
    resume = ["--output-dir", tmp_path, "--resume", "auto", "--time-steps", "3"]
    monkeypatch.setattr(engine.run, "create_data", None)  # before the data are read
    named(fail(monkeypatch, capfd, "digits-dvs/train.py", *resume), "time_steps", 1, 3)


def test_two_processes_start_on_raw_recordings(tmp_path):
    dvs128_gesture(tmp_path / "data", train=1, test=1, count=100)
    flags = ["--data-path", tmp_path / "data", *TINY, "--epochs", "1"]
    train = ["dvs128-gesture/train.py", *flags, "--output-dir", tmp_path / "run", "--amp", "off"]
    children = ranks(2, *train, log=tmp_path / "log")
    assert [child.wait() for child in children] == [0, 0], children[0].output + children[1].output
    test = ["dvs128-gesture/test.py", "--data-path", tmp_path / "data", "--checkpoint", tmp_path / "run/last.pt"]
    succeed(*test)
    result, recorded = result_in(tmp_path / "run"), rows_in(tmp_path / "run")[-1]
    assert (result["loss"], result["top1"]) == (recorded["test_loss"], recorded["test_top1"])
    assert result["count"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recipe_learns_the_digits_before_an_event_camera(tmp_path, seed):
    succeed("digits-dvs/train.py", "--output-dir", tmp_path, "--seed", seed)
    assert rows_in(tmp_path)[-1]["test_top1"] >= 90


def test_the_simulated_camera_sees_changes_alone():
    dot = np.zeros((1, 8, 8), np.uint8)
    assert len(digits.record(dot, seed=0)[0].t) == 0
    dot[0, 4, 4] = 255
    events = digits.record(dot, seed=0)[0]
    assert (np.diff(events.t) >= 0).all()
    on = np.zeros((32, 32), int)
    np.add.at(on, (events.y, events.x), 2 * events.p - 1)
    assert np.abs(on).max() <= 1  # a full turn ends where it began, but for less than one threshold
    assert np.hypot(events.x - 16, events.y - 16).max() < 12


def test_the_digits_of_the_simulated_camera():
    data, again = (digits.create_frames(train=False, layout=Layout(8, (32, 32), 32)) for _ in range(2))
    assert data[0][0].shape == (8, 2, 32, 32)
    counts = np.stack([frames.sum((1, 2, 3)) for frames, _ in data[:20]])
    assert (counts[:, :1] == counts[:, :7]).all()  # parts of equal number
    assert 5_000 < counts.sum(1).mean() < 20_000
    assert np.array_equal(data[7][0], again[7][0])


def test_colours_of_events():
    frames = torch.zeros(3, 2, 2, 2, dtype=torch.uint8)
    frames[1, 1, 0, 0] = 9  # ON
    frames[1, 0, 0, 1] = 9  # OFF
    frames[0] = 9  # not the middle frame
    picture = pictures.of_events(frames)
    assert picture[0].tolist() == [[1, 0, 0], [0, 0, 1]]  # red and blue
    assert (picture[1] == 1).all()  # on white
    assert (pictures.of_events(torch.zeros(1, 2, 2, 2, dtype=torch.uint8)) == 1).all()
