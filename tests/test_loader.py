"""The benchmark of the input pipelines runs, at a small size; its figures are nobody's business here."""

import json
import math

import pytest
import torch
from scripts import fail

from benchmarks import loader


def test_benchmark_of_the_input_pipelines(tmp_path, monkeypatch, capfd, one_core):
    monkeypatch.setattr(loader, "FILES", 3)
    sizes = "--repeats 1 --batches 1 --train-images-per-s imagenet=1e6 --output".split()
    threads = torch.get_num_threads()
    loader.run([*sizes, str(tmp_path)])
    torch.set_num_threads(threads)
    output = capfd.readouterr().out
    (path,) = tmp_path.glob("loader-*-1-core-cpu.json")
    assert str(path) in output
    results = json.loads(path.read_text())["pipelines"]
    assert list(results) == "imagenet imagenet-test cifar10 cifar100 dvs128-gesture cifar10-dvs".split()
    for result in results.values():
        assert result["samples_per_s_of_a_core"] > 0
        assert all(value > 0 for value in result["ms_per_sample"].values())
    for step, names in (
        ("RandAugment", ["imagenet", "cifar10", "cifar100"]),
        ("Resize", ["imagenet-test"]),
        ("mixup on cpu", ["dvs128-gesture", "cifar10-dvs"]),
    ):
        assert [name for name, result in results.items() if step in result["ms_per_sample"]] == names
    gpu = results["imagenet"]["gpu"]
    assert gpu["cores"] == math.ceil(1e6 / results["imagenet"]["samples_per_s_of_a_core"])
    assert f"{gpu['cores']} cores feed a GPU that takes 1,000,000 samples/s" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-images-per-s imagenet", "'imagenet' is not NAME=SAMPLES_PER_SECOND, where NAME is one of imagenet"),
        ("--cases cifar10 --train-images-per-s imagenet=9", "imagenet: not among --cases cifar10"),
    ],
)
def test_a_speed_of_no_pipeline_is_refused(flags, message, monkeypatch, capfd):
    assert message in fail(monkeypatch, capfd, "benchmarks.loader", *flags.split())
