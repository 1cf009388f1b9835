"""Persistent workers give the same batches; the benchmark of the loaders runs at a small size."""

import json
import pickle

import pytest
import timm.utils
import torch
from scripts import load_data
from tiny_data import cifar10_dvs
from torch.utils.data import DataLoader

from benchmarks import loader
from engine.data.event import collate


def same(batches, others):
    return len(batches) == len(others) > 1 and all(
        torch.equal(x, y) for a, b in zip(batches, others, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_an_epoch_of_events_does_not_depend_on_who_serves_it(tmp_path, one_core):
    """Use fresh workers in another number, as a resumed run may have them."""
    flags = ["--data-path", cifar10_dvs(tmp_path, per_class=3, count=50), "--batch-size", 8]

    def epochs(workers, *seeds):
        data, served = load_data("cifar10-dvs/cifar10-dvs.yml", *flags, "--workers", workers), []
        for seed in seeds:
            timm.utils.random_seed(seed)
            served.append(list(data.train.batches(0)))
        return data, served

    data, (first, uninterrupted) = epochs(1, 1, 2)
    assert not same(first, uninterrupted)
    assert same(uninterrupted, epochs(1, 2)[1][0])
    assert same(uninterrupted, epochs(0, 2)[1][0])
    timm.utils.random_seed(2)
    plain = DataLoader(data.train.dataset, 8, shuffle=True, drop_last=True, collate_fn=collate)
    assert [labels.tolist() for _, labels in plain] == [labels.tolist() for _, labels in uninterrupted]


def test_a_kept_worker_starts_each_evaluation_from_its_first_image(data):
    flags = ["--data-path", data / "imagenet", "--num-classes", 4, "--input-size", 32, "--eval-batch-size", 8]
    loaded = load_data("imagenet/qkformer_10_384.yml", *flags, "--workers", 1)
    assert loaded.test.loader.persistent_workers
    assert not loaded.train.source.persistent_workers  # new workers get the epoch's seed
    next(iter(loaded.test))  # and no further, as analyses do
    expected = list(load_data("imagenet/qkformer_10_384.yml", *flags, "--workers", 0).test)
    for _ in range(2):
        assert same(list(loaded.test), expected)


@pytest.mark.parametrize(
    ("recipe", "folder", "flags"),
    [
        ("digits/digits.yml", None, ["--mixup", 0.5]),
        ("imagenet/qkformer_10_384.yml", "imagenet", ["--num-classes", 4]),
        ("cifar10-dvs/cifar10-dvs.yml", "events", []),
    ],
    ids=["digits", "imagenet", "events"],
)
def test_workers_can_be_spawned(recipe, folder, flags, data, tmp_path, one_core):
    """Spawn workers as macOS and Windows do, with pickled arguments."""
    root = data / folder if folder else "none"
    if folder == "events":
        root = cifar10_dvs(tmp_path, per_class=2, count=50)
    loaded = load_data(recipe, *flags, "--batch-size", 4, "--data-path", root, "--workers", 1)
    for source in (loaded.train.source, loaded.test.loader):
        pickle.dumps((source.dataset, source.collate_fn, source.worker_init_fn))


def test_benchmark_of_the_input_pipelines(tmp_path, monkeypatch, one_core):
    monkeypatch.setattr(loader, "FILES", 3)
    monkeypatch.setattr("benchmarks.common.provenance", lambda: {"git_commit": "4d1f"})
    flags = "--repeats 1 --batches 1 --output".split()
    threads = torch.get_num_threads()
    loader.run([*flags, str(tmp_path), "--cases", "cifar10", "imagenet"])
    loader.run([*flags, str(tmp_path)])
    torch.set_num_threads(threads)
    (path,) = tmp_path.glob("loader-*-1-core-cpu.json")
    first, second = (run["results"] for run in json.loads(path.read_text())["runs"])
    assert [result["name"] for result in first] == ["cifar10", "imagenet"]
    assert [result["name"] for result in second] == "imagenet-test cifar100 dvs128-gesture cifar10-dvs".split()
    assert all(result["samples_per_s_of_a_core"] > 0 for result in first + second)
