"""Recordings to frames: equal to spikingjelly's, with errors for damaged, missing and unfinished files."""

import errno
import functools
import hashlib
import http.server
import io
import itertools
import os
import shutil
import signal
import struct
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scripts import ROOT, load_data, named, refuses, run
from spikingjelly import datasets as sj
from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS
from spikingjelly.datasets.dvs128_gesture import DVS128Gesture
from tiny_data import CIFAR10_CLASSES, aedat2, aedat31, cifar10_dvs, dvs128_gesture, events, rewrite

from engine import config
from engine.data import augment, event, recordings
from engine.data.aedat import DamagedRecording, Events, read_aedat, read_aedat2, read_aedat31
from engine.data.augment import sampling
from engine.data.event import split_by_class
from engine.data.frames import WHOLE, Layout, convert, integrate, to_frames
from engine.data.prepare import contents, prepare
from engine.world import World

RANDOM = np.random.default_rng(0)
FEW = events(3, 10, 1003, RANDOM)
GESTURE = "DvsGesture.tar.gz"
FOUR = Layout(4, (128, 128), 128)


@pytest.fixture
def spikingjelly(monkeypatch):
    """Patch spikingjelly for tiny data: threads would hide exceptions, and numpy has changed."""

    class SameThread(ThreadPoolExecutor):
        def submit(self, function, *arguments):
            function(*arguments)

    for module in (sj, sj.dvs128_gesture, sj.cifar10_dvs):
        monkeypatch.setattr(module, "ThreadPoolExecutor", SameThread)
    monkeypatch.setattr(sj.utils, "check_integrity", lambda fpath, md5: True)
    monkeypatch.setattr(np, "fromstring", lambda data, dtype: np.frombuffer(data, dtype))


def load(name, root, *flags, **rank):
    return load_data(f"{name}/{name}.yml", "--data-path", root, "--workers", 0, *flags, **rank)


def test_aedat31_is_read_as_by_spikingjelly(tmp_path):
    content = aedat31(*FEW, per_packet=100)
    header = struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, 100, 100, 100)
    late = struct.pack("<HHIIIIII", 1, 1, 8, 4, 1, 100, 100, 100)  # its clock has run over once
    content = content.replace(header, late, 1)
    (tmp_path / "x.aedat").write_bytes(content)
    expected, actual = sj.load_aedat_v3(str(tmp_path / "x.aedat")), read_aedat31(content)
    assert all(np.array_equal(expected[key], getattr(actual, key)) for key in "txyp")
    assert actual.t[0] == FEW[0][0] + 2**31


@pytest.mark.parametrize("frames", [1, 7, 16])
def test_frames_are_those_of_spikingjelly(frames):
    events = dict(zip("txyp", FEW, strict=True))
    expected = sj.integrate_events_by_fixed_frames_number(events, "number", frames, 128, 128)
    actual = integrate(Events(*FEW), frames)
    assert np.array_equal(expected, actual)
    assert (actual.dtype, actual.sum()) == (np.uint8, 1003)
    assert actual[-1].sum() == 1003 // frames + 1003 % frames  # the last takes the rest


def test_counts_above_a_byte():
    frames = integrate(Events(*(np.full(1000, value) for value in (0, 5, 6, 1))), 2)
    assert (frames.dtype, frames[0, 1, 6, 5]) == (np.uint16, 500)


def test_a_recording_is_cut_by_time_in_order_or_not():
    shuffled = Events(*(values[RANDOM.permutation(1003)] for values in FEW))
    for recording in (Events(*FEW), shuffled):
        for start, end in ((0, 400_000), (300_000, 700_000), WHOLE):
            chosen = (recording.t >= start) & (recording.t < end)
            part = Events(*(values[chosen] for values in recording[:4]))
            assert np.array_equal(to_frames(recording, FOUR, (start, end)), integrate(part, 4))


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (read_aedat2, b""),
        (read_aedat31, b""),
        (read_aedat2, aedat31(*FEW)),
        (read_aedat31, aedat2(*FEW)),
        (read_aedat2, aedat2(*FEW)[:-3]),
        (read_aedat31, aedat31(*FEW)[:-8]),
        (read_aedat31, aedat31(*FEW)[:-40]),
        (read_aedat31, b"#!AER-DAT3.1\r\n#"),
        (read_aedat31, b"#!AER-DAT3.1\r\n#!END-HEADER\r\n"),
    ],
)
def test_damaged_recordings_are_refused(read, content):
    with pytest.raises(DamagedRecording):
        read(content)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (aedat2(*FEW)[:-8] + struct.pack(">II", 1 << 31, 0), "sensor"),
        (aedat2(*FEW) + struct.pack(">II", 1 << 15, 0), "sensor"),
        (aedat31(*FEW).replace(b"RAW", b"SERIALIZED"), "SERIALIZED"),
        (aedat31(*FEW) + struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, 5, 3, 3) + bytes(40), "5"),
    ],
    ids=["other sensor", "special event", "serialized", "room for more"],
)  # fmt: skip
def test_recordings_of_another_kind_are_refused(content, value):
    read_aedat(aedat2(*FEW))
    with pytest.raises(DamagedRecording, match=value):
        read_aedat(content)


def test_invalid_events_are_left_out_and_counted(tmp_path, one_core, warnings):
    content = bytearray(aedat31(*FEW, per_packet=10_000))
    words = np.frombuffer(content, "<u4", offset=len(content) - 8 * 1003).reshape(-1, 2)
    words[::10, 0] &= ~np.uint32(1)
    events = read_aedat31(bytes(content))
    assert (len(events.t), events.invalid) == (902, 101)
    assert np.array_equal(events.x, np.delete(FEW[1], np.arange(0, 1003, 10)))
    root = dvs128_gesture(tmp_path, train=1, test=1, count=50)
    labels = b"class\n1,0,500000\n1,500000,1000000\n"
    changes = {"DvsGesture/user01_led.aedat": bytes(content), "DvsGesture/user01_led_labels.csv": labels}
    rewrite(root / "download" / GESTURE, lambda files: files | changes)
    load("dvs128-gesture", root, "--batch-size", "2")
    named(warnings[0], 101, "user01_led.aedat")


def test_recordings_in_another_format_are_reported(tmp_path):
    root = cifar10_dvs(tmp_path, per_class=2, count=50)
    (root / "download/cat.zip").unlink()
    (root / "cat").mkdir()
    (root / "cat/x.aedat4").write_bytes(b"")
    (root / "cat/._x.aedat").write_bytes(b"")
    with refuses(root / "cat", ".aedat4"):
        load("cifar10-dvs", root)


def test_files_of_systems_are_no_recordings(tmp_path):
    zipped, folder = cifar10_dvs(tmp_path / "zip", per_class=1, count=50), tmp_path / "folder"
    for archive in (zipped / "download").iterdir():
        names = (f"{archive.stem}/._x.aedat", "__MACOSX/x.aedat", ".ipynb_checkpoints/x.aedat")
        rewrite(archive, lambda files, names=names: files | dict.fromkeys(names, b"junk"))
        shutil.unpack_archive(archive, folder)
    for root in (zipped, folder):
        assert len(recordings.cifar10_dvs(root, False)) == 10
    root = dvs128_gesture(tmp_path / "tar", train=1, test=1, count=50)
    rewrite(root / "download" / GESTURE, lambda files: files | {f"DvsGesture/._{Path(n).name}": b"junk" for n in files})
    assert len(recordings.dvs128_gesture(root, False)) == 2


def test_events_that_do_not_fill_the_frames_or_leave_the_sensor():
    with pytest.raises(DamagedRecording, match=r"1003.*1004"):
        integrate(Events(*FEW), 1004)
    for x, y in ((128, 0), (0, 128)):
        with pytest.raises(DamagedRecording, match="128"):
            integrate(Events(*(np.full(5, value) for value in (0, x, y, 0))), 1)


def assert_equal_samples(loader, expected):
    dataset = getattr(loader.dataset, "dataset", loader.dataset)
    assert len(dataset) == len(expected)
    for (frames, label), (their_frames, their_label) in zip(dataset, expected, strict=True):
        assert label == their_label
        assert np.array_equal(frames, their_frames)


BY_NUMBER = {"data_type": "frame", "frames_number": 4, "split_by": "number"}


@pytest.mark.parametrize("extracted", [False, True])
def test_dvs128_gesture_is_that_of_spikingjelly(extracted, tmp_path, one_core, spikingjelly):
    root = dvs128_gesture(tmp_path / "ours", extracted=extracted)
    actual = load("dvs128-gesture", root, *"--batch-size 4 --time-steps 4".split())
    root = dvs128_gesture(tmp_path / "theirs")
    for is_train, loader, count in ((True, actual.train, 48), (False, actual.test, 12)):
        expected = DVS128Gesture(str(root), train=is_train, **BY_NUMBER)
        assert len(expected) == count
        assert_equal_samples(loader, expected)
    assert actual.classes[2] == "other gestures"  # the folders 0, 1, 10, 2, ...: label 2 is gesture 11
    names = [Path(file).name for file in actual.split["test"] if "/10/" in file]
    assert names == ["user05_led_0.npy", "user05_led_1.npy"]


def test_cifar10_dvs_is_that_of_spikingjelly(tmp_path, one_core, spikingjelly):
    actual = load("cifar10-dvs", cifar10_dvs(tmp_path / "ours", per_class=11), "--time-steps", "4")
    expected = CIFAR10DVS(str(cifar10_dvs(tmp_path / "theirs", per_class=11)), **BY_NUMBER)
    for loader, part in zip((actual.train, actual.test), sj.split_to_train_test_set(0.9, expected, 10), strict=True):
        assert_equal_samples(loader, part)
    assert "cat/cifar10_cat_9.npy" in actual.split["test"]  # in the order of text, 10 comes before 9


def test_the_split_needs_names_alone():
    files = [f"{label}/{label}_{i}.npy" for label in "ab" for i in range(20)]
    split = split_by_class(files, None)
    assert [len(split[part]) for part in ("train", "test")] == [36, 4]
    assert split["test"] == ["a/a_8.npy", "a/a_9.npy", "b/b_8.npy", "b/b_9.npy"]
    random = split_by_class(files, 1)
    assert random == split_by_class(list(reversed(files)), 1)
    assert random != split_by_class(files, 2)
    assert random["test"] != split["test"]
    assert sorted(random["train"] + random["test"]) == sorted(files)
    assert [file[0] for file in random["test"]] == list("aabb")


def test_each_process_trains_on_its_share_and_all_test_every_sample_once(tmp_path, one_core):
    root = cifar10_dvs(tmp_path, per_class=20, count=50)
    shares = [load("cifar10-dvs", root, "--batch-size", "8", rank=rank, world_size=2) for rank in range(2)]
    orders = []
    for epoch in range(2):
        for share in shares:
            share.train.sampler.set_epoch(epoch)
        orders.append([index for share in shares for index in share.train.sampler])
        assert sorted(orders[-1]) == list(range(180))
    assert orders[0] != orders[1]
    first, second = (list(share.test.sampler) for share in shares)
    assert sorted(first + second) == list(range(20))
    assert first == [*range(8), *range(16, 20)]  # whole batches, round-robin


def find(root):
    return functools.partial(recordings.cifar10_dvs, root, False)


def die_at_file(number):
    """Function to run before a script, which dies while it writes this file of frames."""
    files, save = itertools.count(1), np.save

    def save_or_die(file, *arguments, **kwargs):
        if next(files) == number:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(file, *arguments, **kwargs)

    np.save = save_or_die


def test_killed_while_preparing_it_goes_on_to_the_same_frames(tmp_path, one_core):
    root = cifar10_dvs(tmp_path / "data", per_class=2, count=100)
    before = {path: path.read_bytes() for path in (root / "download").iterdir()}
    whole = shutil.copytree(root, tmp_path / "whole")
    train = [ROOT / "cifar10-dvs/train.py", *"--time-steps 4 --data-path".split(), root]
    killed = run(*train, cwd=tmp_path, before=functools.partial(die_at_file, 8))
    assert killed.returncode == -signal.SIGKILL
    partial, frames = root / "frames_4.partial", root / "frames_4"
    done = {path.relative_to(partial): path.stat().st_mtime_ns for path in partial.glob("*/*.npy")}
    assert len(done) == 7
    assert not frames.exists()
    assert list(partial.rglob("*.tmp"))
    for folder in (root, whole):
        prepare(folder, FOUR, find(folder), show=False)
    names = contents(frames, CIFAR10_CLASSES)
    assert len(names) == 20
    for name in names:
        assert (frames / name).read_bytes() == (whole / "frames_4" / name).read_bytes()
    assert all((frames / path).stat().st_mtime_ns == time for path, time in done.items())
    assert {path.name for path in frames.iterdir()} == set(CIFAR10_CLASSES)
    assert not list(frames.rglob("*.tmp"))
    assert {path: path.read_bytes() for path in (root / "download").iterdir()} == before


def test_of_several_at_once_the_first_prepares(tmp_path, one_core):
    root = cifar10_dvs(tmp_path, per_class=2, count=50)
    finder = Mock(side_effect=find(root))
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda _: prepare(root, FOUR, finder, False), range(3)))
    assert finder.call_count == 1
    assert len(contents(root / "frames_4", CIFAR10_CLASSES)) == 20


def replace(what, by):
    """Return a change for `rewrite`: other content of a file, or None to remove it."""

    def change(files):
        (name,) = [name for name in files if name.endswith(what)]
        old = files.pop(name)
        content = by(old) if callable(by) else by
        return files if content is None else files | {name: content}

    return change


@pytest.mark.parametrize(
    ("archive", "change", "value"),
    [
        ("cat.zip", replace("cat_1.aedat", lambda c: c[:-3]), "cifar10_cat_1.aedat"),
        ("cat.zip", replace("cat_1.aedat", aedat2(*FEW)[: 27 + 40]), "cifar10_cat_1.aedat"),
        ("cat.zip", lambda files: {}, "cat.zip"),
        ("frog.zip", None, "frog.zip"),
        (GESTURE, replace("01_led.aedat", lambda c: c[:-9]), "user01_led.aedat"),
        (GESTURE, replace("user01_led.aedat", None), "user01_led.aedat"),
        (GESTURE, replace("01_led_labels.csv", None), "user01_led_labels.csv"),
        (GESTURE, replace("to_test.txt", None), "trials_to_test.txt"),
        (GESTURE, replace("01_led_labels.csv", b"class\n12,0,9\n"), "'12,0,9'"),
        (GESTURE, replace("01_led_labels.csv", b"class\n1,7,7\n"), "'1,7,7'"),
        (GESTURE, replace("01_led_labels.csv", b"class\n1,1\n"), "'1,1'"),
        (GESTURE, replace("01_led_labels.csv", b"class\n"), "user01_led_labels.csv"),
        (GESTURE, replace("01_led_labels.csv", b"class\n1,90000000,95000000\n"), "user01_led.aedat"),
    ],
)
def test_missing_and_damaged_recordings_are_reported(archive, change, value, tmp_path, one_core):
    name, make = ("dvs128-gesture", dvs128_gesture) if archive == GESTURE else ("cifar10-dvs", cifar10_dvs)
    archive = make(tmp_path, 3, count=50) / "download" / archive
    rewrite(archive, change) if change else archive.unlink()
    before = {path: path.read_bytes() for path in archive.parent.iterdir()}
    with refuses(value):
        load(name, tmp_path, "--batch-size", "2")
    assert {path: path.read_bytes() for path in archive.parent.iterdir()} == before
    assert not (tmp_path / "frames_16").exists()


def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path, one_core):
    path = cifar10_dvs(tmp_path, per_class=2, count=500) / "download/ship.zip"
    content = bytearray(path.read_bytes())
    content[500] ^= 4
    path.write_bytes(content)
    with refuses(1, 20, "ship.zip", "cifar10_ship_0.aedat"):
        load("cifar10-dvs", tmp_path)


def test_no_flipped_bit_in_a_tar_goes_unnoticed(tmp_path):
    path = dvs128_gesture(tmp_path, train=1, test=1, count=50) / "download/DvsGesture.tar.gz"
    content = path.read_bytes()
    for place in RANDOM.integers(10, len(content), 20):
        damaged = bytearray(content)
        damaged[place] ^= 1 << RANDOM.integers(8)
        path.write_bytes(damaged)
        with refuses(path):
            recordings.dvs128_gesture(tmp_path, False)
    path.write_bytes(content)
    assert len(recordings.dvs128_gesture(tmp_path, False)) == 2


def test_members_may_be_named_as_they_like(tmp_path, one_core):
    root = cifar10_dvs(tmp_path, per_class=2, count=50)
    rewrite(root / "download/cat.zip", lambda files: {f"./a//{name}": content for name, content in files.items()})
    data = load("cifar10-dvs", root, "--batch-size", "2")
    assert [name for name in data.split["test"] if "cat" in name] == ["cat/cifar10_cat_1.npy"]


def test_processes_that_prepare_import_little():
    """Many run at once, and torch takes hundreds of megabytes."""
    code = "import sys, engine.data.frames; print(sorted({'torch', 'timm', 'matplotlib'} & set(sys.modules)))"
    assert run("-c", code).stdout == "[]\n"
    for function in (recordings.read_member, convert):
        assert function.__module__ == "engine.data.frames"


def test_the_page_of_the_gestures_is_that_of_spikingjelly():
    assert DVS128Gesture.resource_url_md5()[0][1] == recordings.GESTURE_PAGE


def test_a_killed_worker_is_an_error(tmp_path, monkeypatch):
    root = cifar10_dvs(tmp_path, per_class=2, count=50)
    monkeypatch.setattr("joblib.Parallel.__call__", Mock(side_effect=BrokenProcessPool))
    with refuses(root / "frames_4"):
        prepare(root, FOUR, find(root), False)


@pytest.mark.parametrize(
    ("name", "make", "size"), [("cifar10-dvs", cifar10_dvs, "9,000"), ("dvs128-gesture", dvs128_gesture, "1,176")]
)
def test_an_incomplete_data_set_is_reported_every_time(name, make, size, tmp_path, one_core, warnings):
    make(tmp_path, 2, count=50)
    for count in (2, 4):
        load(name, tmp_path, "--batch-size", "2")
        assert len(warnings) == count
        named(warnings[count - 2], name, size)


def test_training_frames_are_augmented_and_mixed_as_the_recipe_says(tmp_path, one_core, monkeypatch):
    root = cifar10_dvs(tmp_path, per_class=3, count=50)
    plain = ["--hflip", "0", "--auto-augment", "none", "--batch-size", "8"]
    stored = load("cifar10-dvs", root, *plain).train.dataset
    known = {np.asarray(frames, np.float32).tobytes(): label for frames, label in stored}

    def epoch(*flags):
        """Return the data and the network's training inputs of an epoch."""
        torch.manual_seed(0)
        data = load("cifar10-dvs", root, *plain, *flags)
        batches = [(data.augment(x) if data.augment else x, labels) for x, labels in data.train.batches(0)]
        assert len(batches) == 2  # of 20, the rest is dropped
        return data, [sample for batch in batches for sample in zip(*batch, strict=True)]

    _, samples = epoch()
    assert all(known[frames.numpy().tobytes()] == label for frames, label in samples)
    assert {frames.dtype for frames, _ in samples} == {torch.float32}
    _, samples = epoch("--hflip", "1")
    assert all(known[frames.flip(-1).numpy().tobytes()] == label for frames, label in samples)
    used = []
    monkeypatch.setattr(augment, "sampling", lambda *a: used.append(a[0]) or sampling(*a))
    data, _ = epoch("--auto-augment", "snn-wide")
    assert len(set(used)) > 3
    assert (data.mixup.mixup_alpha, data.mixup.mix_prob, data.mixup.label_smoothing) == (0.5, 0.5, 0.1)
    assert (data.mixup.cutmix_alpha, data.mixup.mode, data.mixup.num_classes) == (0, "batch", 10)
    used.clear()
    shown = [frames.numpy() for batch, _ in data.test for frames in batch]
    assert all(np.array_equal(a, b) for a, (b, _) in zip(shown, data.test.dataset, strict=True))
    assert not used


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_batches_are_counts_on_the_device(dtype, device):
    cfg = config.load(ROOT / "cifar10-dvs/cifar10-dvs.yml", ["--batch-size", "4", "--workers", "0"])
    frames = [RANDOM.integers(np.iinfo(dtype).max, size=(4, 2, 8, 8), dtype=dtype) for _ in range(6)]
    dataset, where = list(zip(frames, range(6), strict=True)), World(0, 1, torch.device(device))
    batches = list(event.create_loader(cfg, where, dataset, False, event.collate, **event.COUNTS))
    assert all(values.device.type == device for batch in batches for values in batch)
    assert {batch[0].dtype for batch in batches} == {torch.float32}
    assert np.array_equal(torch.cat([batch[0] for batch in batches]).cpu(), np.stack(frames))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dvs128-gesture", ["DvsGesture.tar.gz", "https://ibm.ent.box.com/"]),
        ("cifar10-dvs", ["airplane.zip", "automobile.zip", "--download"]),
    ],
)
def test_missing_files_and_their_place_are_reported(name, values, tmp_path):
    with refuses(tmp_path / "download", *values):
        load(name, tmp_path)


def test_cifar10_dvs_can_be_fetched(tmp_path, one_core, monkeypatch):
    """Existing files stay; a file with a wrong checksum is an error and is removed."""
    source = cifar10_dvs(tmp_path / "source", per_class=2, count=50) / "download"
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=source)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    files = [
        (path.name, address + path.name, hashlib.md5(path.read_bytes()).hexdigest())
        for path in sorted(source.iterdir())
    ]
    wrong = [*files[:-1], (*files[-1][:2], 32 * "0")]
    monkeypatch.setattr(CIFAR10DVS, "resource_url_md5", lambda: wrong)
    root = tmp_path / "data"
    with refuses("truck.zip"):
        load("cifar10-dvs", root, "--download", "--batch-size", "2")
    assert not (root / "download/truck.zip").exists()
    mine = root / "download/cat.zip"
    with zipfile.ZipFile(mine, "a") as archive:
        archive.comment = b"mine"
    content = mine.read_bytes()
    monkeypatch.setattr(CIFAR10DVS, "resource_url_md5", lambda: files)
    load("cifar10-dvs", root, "--download", "--batch-size", "2")
    assert mine.read_bytes() == content
    assert {path.name for path in (root / "download").iterdir()} == {f"{name}.zip" for name in CIFAR10_CLASSES}
    server.shutdown()


def test_a_frames_folder_is_not_trusted(tmp_path, one_core, warnings):
    again = functools.partial(load, "cifar10-dvs", cifar10_dvs(tmp_path, 2, count=50), "--batch-size", "2")
    again()
    damaged = tmp_path / "frames_16/cat/cifar10_cat_0.npy"
    data, whole = again(), damaged.read_bytes()
    contents = [whole[:-5], b"", b"PK\x03\x04garbage"]
    for array in (np.zeros((3, 2, 128, 128), np.uint8), np.zeros((16, 2, 128, 128)), np.array(["x"])):
        np.save(file := io.BytesIO(), array)
        contents.append(file.getvalue())
    np.savez(file := io.BytesIO(), np.zeros(3))
    for content in (*contents, file.getvalue()):
        damaged.write_bytes(content)
        with refuses(damaged):
            list(data.train.batches(0))
    damaged.unlink()
    warnings.clear()
    assert len(again().train.dataset) == 9
    named(warnings[0], 9, "9,000")


def test_a_disk_that_fills_up(tmp_path, one_core, monkeypatch):
    root, written = cifar10_dvs(tmp_path, per_class=2, count=50), []

    def fill(file, *arguments, save=np.save, **kwargs):
        if len(written) == 5:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        save(file, *arguments, **kwargs)

    with monkeypatch.context() as full, refuses("No space left on device"):
        full.setattr(np, "save", fill)
        prepare(root, FOUR, find(root), False)
    assert len(list((root / "frames_4.partial").rglob("*.*"))) == 5
    assert len(contents(prepare(root, FOUR, find(root), False), CIFAR10_CLASSES)) == 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", "11"),
        ("auto_augment", "rand-m9"),
        ("mixup_in", "loader"),
        ("cutmix", "0.5"),
        ("in_channels", "3"),
    ],
)
def test_settings_that_do_not_fit_event_frames(key, value, tmp_path):
    with refuses(key, value):
        load("cifar10-dvs", tmp_path, f"--{key}", value)
