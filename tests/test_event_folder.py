"""Folders of recordings and frames, in files that spikingjelly and tonic write and read."""

import itertools
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch
from scripts import ROOT, load_data, named, refuses
from spikingjelly import datasets as sj
from spikingjelly.datasets.n_mnist import NMNIST

from engine import config
from engine.data.aedat import Events
from engine.data.event import read_recording
from engine.data.frames import integrate

RANDOM = np.random.default_rng(0)
CLASSES = ["0", "1", "2"]


pytestmark = pytest.mark.usefixtures("one_core")
FLAGS = "--dataset eventfolder --num-classes 3 --batch-size 2 --workers 0 --time-steps 4 --data-path".split()


def settings(root, *flags):
    return config.load(ROOT / "cifar10-dvs/cifar10-dvs.yml", [*FLAGS, str(root), *map(str, flags)])


def load(root, *flags):
    return load_data("cifar10-dvs/cifar10-dvs.yml", *FLAGS, root, *flags)


def stored(loader):
    """Return {file: frames} of a loader's data set."""
    dataset = getattr(loader.dataset, "dataset", loader.dataset)
    return {file: frames for (_, file), (frames, _) in zip(dataset.samples, dataset, strict=True)}


def events(side=34, count=300, height=None):
    columns = [RANDOM.integers(0, most, count) for most in (side, height or side, 2)]
    return Events(np.sort(RANDOM.integers(0, 300_000, count)), *columns)


def save(path, recording, kind=".npz"):
    """Write a recording in a format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.with_suffix(kind)
    if kind == ".npz":
        np.savez(path, **dict(zip("txyp", recording[:4], strict=True)))
    elif kind == ".npy":  # tonic's array
        columns = [recording.x, recording.y, recording.t, recording.p]
        np.save(path, np.array(list(zip(*columns, strict=True)), [(name, int) for name in "xytp"]))
    else:
        path.write_bytes(tiny_data.atis(*recording[:4]))


def folder(root, parts=("train", "test"), classes=CLASSES, per_class=2, kind=".npz", **how):
    """Write PART/CLASS/NUMBER.npz."""
    for part, label, i in itertools.product(parts, classes, range(per_class)):
        save(root / part / label / str(i), events(**how), kind)
    return root


def test_n_mnist_as_published_as_events_and_as_frames_is_that_of_spikingjelly(tmp_path):
    published, arrays, frames = (tmp_path / name for name in ("NMNIST", "events_np", "frames_number_4_split_by_number"))
    for part in ("Train", "Test"):  # the layout of tonic, too
        for label in CLASSES:
            for i in range(2):
                save(published / part / label / f"{i:05d}", events(), ".bin")
    arrays.mkdir()
    NMNIST.create_events_np_files(str(published), str(arrays))
    expected = {}
    for path in sorted(arrays.rglob("*.npz")):
        place = frames / path.parent.relative_to(arrays)
        place.mkdir(parents=True, exist_ok=True)
        sj.integrate_events_file_to_frames_file_by_fixed_frames_number(
            np.load, str(path), str(place), "number", 4, *NMNIST.get_H_W()
        )
        expected[path.relative_to(arrays).with_suffix("").as_posix()] = sj.load_npz_frames(str(place / path.name))
    for root in (published, arrays, frames):
        data = load(root, "--input-size", 34)
        actual = {name.split(".")[0]: frames for name, frames in (stored(data.train) | stored(data.test)).items()}
        assert len(data.train.dataset) == len(data.test.dataset) == 6
        assert actual.keys() == expected.keys()
        assert all(np.array_equal(frames, expected[name]) for name, frames in actual.items())
        assert data.classes == CLASSES
        (path, *_) = sorted(root.glob("*est/1/*"))
        alone = read_recording(path, settings(root, "--input-size", 34))
        assert np.array_equal(alone, expected[f"test/1/{path.stem}"])
        assert alone.dtype == torch.float32


def test_every_format_gives_the_same_frames(tmp_path, monkeypatch):
    recording = events(side=128)
    t, x, y, p = recording[:4]
    root = folder(tmp_path / "data", side=128)
    place = root / "train/0"
    for kind in (".npz", ".npy", ".bin"):
        save(place / f"x{kind[1:]}", recording, kind)
    save(place / "signed", recording._replace(p=2 * p - 1))
    (place / "jaer.AEDAT").write_bytes(tiny_data.aedat2(t, 127 - y, 127 - x, 1 - p))
    (place / "caer.aedat").write_bytes(tiny_data.aedat31(*recording[:4]))
    np.save(place / "frames.npy", integrate(recording, 4))
    np.savez(place / "frames.npz", frames=integrate(recording, 4).astype(float))
    (place / "dv.aedat4").write_bytes(b"#!AER-DAT4.0")
    packets = np.array(list(zip(t, x, y, p, strict=True)), [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")])

    def decoder(path):
        assert Path(path).read_bytes() == b"#!AER-DAT4.0"
        return iter([{"stream_id": 0, "events": packets[:100]}, {"frame": None}, {"events": packets[100:]}])

    monkeypatch.setitem(sys.modules, "aedat", types.SimpleNamespace(Decoder=decoder))
    actual = stored(load(root).train)
    alike = [f for name, f in actual.items() if name.startswith("train/0/") and not name.split("/")[2][0].isdigit()]
    assert len(alike) == 9
    assert all(np.array_equal(frames, integrate(recording, 4)) for frames in alike)


@pytest.mark.parametrize("side", [48, 200, 250])
def test_other_sensors_are_added_up_or_repeated(side, tmp_path):
    """N-Caltech101 has 180 x 240 pixels."""
    root = folder(tmp_path, side=240, height=180)
    frames = stored(load(root, "--input-size", side, "--sensor-size", 180, 240).train)["train/2/1.npz.npy"]
    recording = np.load(root / "train/2/1.npz")
    whole = integrate(Events(*(recording[name] for name in "txyp")), 4, 180, 240)
    expected = whole
    for axis, size in ((2, 180), (3, 240)):
        rows, places = np.moveaxis(expected, axis, 0), np.arange(size) * side // size
        parts = rows[np.arange(side) * size // side] if side > size else [rows[places == i].sum(0) for i in range(side)]
        expected = np.moveaxis(np.array(parts), 0, axis)
    assert np.array_equal(frames, expected)
    assert side != 48 or frames.sum() == 300  # nothing is lost
    assert (root / f"frames_4_{side}_of_180x240").is_dir()


def test_one_tree_is_split_by_a_seed(tmp_path):
    root = folder(tmp_path, parts=[""], per_class=4)
    (root / "0").rename(root / "0.up")  # no file, in spite of the dot
    with refuses(tmp_path, "--split-seed"):
        load(root, "--input-size", 34)
    data = load(root, "--input-size", 34, "--split-seed", 1)
    again = load(root, "--input-size", 34, "--split-seed", 1)  # the folder of frames is no class
    assert data.split == again.split
    assert [len(data.split[part]) for part in ("train", "test")] == [9, 3]
    assert load(root, "--input-size", 34, "--split-seed", 2).split != data.split
    save(root / "1/new", events())
    with refuses(root / "frames_4_34"):
        load(root, "--input-size", 34, "--split-seed", 1)


def test_other_event_sets_are_resized_too(tmp_path):
    root, flags = tiny_data.cifar10_dvs(tmp_path, per_class=2, count=50), ["--batch-size", 2, "--workers", 0]
    whole, small = (
        load_data("cifar10-dvs/cifar10-dvs.yml", "--data-path", root, *flags, "--input-size", side)
        for side in (128, 64)
    )
    for (a, _), (b, _) in zip(whole.test.dataset, small.test.dataset, strict=True):
        assert np.array_equal(a.reshape(16, 2, 64, 2, 64, 2).sum((3, 5)), b)


def put(name, content):
    """Return a damage that writes a file of an array, arrays or bytes."""

    def damage(root):
        path = root / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, dict):
            np.savez(path, **content)
        else:
            np.save(path, content)

    return damage


FRAMES = np.ones((4, 2, 34, 34))
PLAIN = {"t": np.arange(9), "x": np.arange(9), "y": np.arange(9), "p": np.arange(9) % 2}


@pytest.mark.parametrize(
    ("damage", "flags", "values"),
    [
        (put("train/0/x.npz", {"frames": np.ones((10, 2, 34, 34))}), [], ["x.npz", "10 frames", "--time-steps"]),
        (put("train/0/x.npy", FRAMES / 2), [], ["x.npy", "counts"]),
        (put("train/0/x.npy", FRAMES * np.nan), [], ["x.npy", "counts"]),
        (put("train/0/x.npy", -FRAMES), [], ["x.npy", "counts"]),
        (put("train/0/x.npy", FRAMES[:, :1]), [], ["x.npy"]),
        (put("train/0/x.npy", FRAMES[0]), [], ["x.npy"]),
        (put("train/0/x.npz", {"data": FRAMES}), [], ["x.npz"]),
        (put("train/0/x.npz", PLAIN | {"p": np.arange(9)}), [], ["x.npz"]),
        (put("train/0/x.npz", PLAIN | {"x": np.arange(-1, 8)}), [], ["x.npz"]),
        (put("train/0/x.npz", PLAIN | {"t": np.arange(8)}), [], ["x.npz"]),
        (put("train/0/x.npz", PLAIN | {"x": np.arange(9) + 0.5}), [], ["x.npz"]),
        (put("train/0/x.npz", PLAIN | {"t": np.full(9, np.nan)}), [], ["x.npz"]),
        (put("train/0/x.npz", {k: v[:0] for k, v in PLAIN.items()}), [], ["x.npz", "--time-steps"]),
        (put("train/0/x.npz", {k: v[:3] for k, v in PLAIN.items()}), [], ["x.npz", "--time-steps"]),
        (put("train/0/x.npz", b"PK"), [], ["x.npz"]),
        (put("train/0/x.bin", bytes(99)), [], ["x.bin", "99"]),
        (put("train/0/x.aedat4", b""), [], ["x.aedat4", "pip install aedat"]),
        (put("train/0/x.aedat", b""), [], ["x.aedat"]),
        (None, ["--input-size", "32"], ["34 x 34", "--sensor-size"]),
        (None, ["--sensor-size", "34"], ["sensor_size"]),
        (None, ["--num-classes", "4"], ["num_classes", "3"]),
        (None, ["--split-seed", "4"], ["split_seed"]),
        (None, ["--data-path", "no/where"], ["no/where"]),
        (lambda root: shutil.rmtree(root / "test"), [], ["train and test"]),
        (lambda root: shutil.rmtree(root / "test/1"), [], ["class 1"]),
        (lambda root: (root / "test/3").mkdir(), [], ["class 3"]),
        (lambda root: [path.unlink() for path in (root / "test/1").iterdir()], [], ["test/1"]),
    ],
)
def test_unusable_folders_and_files_are_refused(damage, flags, values, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aedat", None)
    root = folder(tmp_path / "data")
    if damage:
        damage(root)
    with refuses(*values):
        load(root, "--input-size", 34, *flags)


def test_invalid_events_of_a_file_are_counted(tmp_path, warnings):
    content = bytearray(tiny_data.aedat31(*events(side=128)[:4]))
    content[-8] &= 0xFE  # of the last event
    (tmp_path / "x.aedat").write_bytes(content)
    frames = read_recording(tmp_path / "x.aedat", settings(tmp_path))
    assert frames.sum() == 299
    named(warnings[0], tmp_path / "x.aedat", ": 1 ")


@pytest.mark.parametrize(("name", "content"), [("x.npz", b"PK"), ("x.txt", b"PK"), ("x.npz", b"text")])
def test_an_unreadable_file_is_reported_without_advice_to_unpickle_it(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with refuses(tmp_path / name) as error:
        read_recording(tmp_path / name, settings(tmp_path))
    assert "pickle" not in str(error.value)


def recordings_of_the_page(root):
    """Make the recordings that docs/data.md describes, of two classes each; test_readme.py runs its commands."""
    two = {"classes": ("left", "right")}
    for name, how in {
        "hands": {"side": 240, "height": 180},
        "unsplit": {"parts": [""], "per_class": 4},
        "NMNIST": {"parts": ["Train", "Test"], "kind": ".bin"},
        "Caltech101": {"parts": [""], "per_class": 4, "kind": ".bin", "side": 240, "height": 180},
        "events_np": {"side": 128},
    }.items():
        folder(root / name, **two, **how)
    save(root / "hands/test/left/9", events(240, height=180))
    for path in (root / "events_np").rglob("*.npz"):
        place = root / "frames_number_16_split_by_number" / path.parent.relative_to(root / "events_np")
        place.mkdir(parents=True, exist_ok=True)
        sj.integrate_events_file_to_frames_file_by_fixed_frames_number(
            np.load, str(path), str(place), "number", 16, 128, 128
        )
