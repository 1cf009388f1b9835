"""No data file runs code, is written outside its place or takes the machine; a broken one ends in one clear line."""

import os
import pickle

import numpy as np
import pytest
import torchvision.datasets.cifar
from scripts import ROOT
from tiny_data import cifar

from engine import config
from engine.data import datasets
from engine.data.datasets import create_dataset
from engine.errors import UserError


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """What a payload leaves behind where it runs."""
    monkeypatch.setenv("PAYLOAD_MARK", str(tmp_path / "ran"))
    return tmp_path / "ran"


class Payload:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["PAYLOAD_MARK"],)


def refusal(recipe, *flags, train=True):
    """The line in which the data set is refused, as it is made."""
    with pytest.raises(UserError) as error:
        create_dataset(config.load(ROOT / recipe, list(map(str, flags))), train)
    return str(error.value)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Flags for CIFAR-10 in `tmp_path`, whose files need not be the published ones; and what rewrites one."""
    for module in (torchvision.datasets.cifar, datasets):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    folder = cifar(tmp_path, 10, train=10, test=10) / "cifar-10-batches-py"

    def rewrite(file, **entries):
        content = pickle.loads((folder / file).read_bytes())
        (folder / file).write_bytes(pickle.dumps(content | entries, protocol=2))

    return ["cifar10/cifar10.yml", "--data-path", tmp_path], rewrite


class OfPython2(pickle._Pickler):
    """Writes bytes as the published files have them."""

    def save_bytes(self, content):
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(content)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes}


@pytest.mark.parametrize("order", "CF")
def test_cifars_pickles_give_arrays(order, tmp_path, cifar10):
    flags, _ = cifar10
    path = tmp_path / "cifar-10-batches-py/test_batch"
    content = pickle.loads(path.read_bytes())
    with path.open("wb") as file:
        OfPython2(file, 2).dump(content | {"data": np.asarray(content["data"], order=order)})
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    dataset = create_dataset(config.load(ROOT / flags[0], list(map(str, flags[1:]))), train=False)
    assert np.array_equal(dataset.data, content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert dataset.targets == content["labels"]


@pytest.mark.parametrize("place", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_payload_in_cifars_pickles_does_not_run(place, cifar10, mark):
    flags, rewrite = cifar10
    rewrite(place, extra=Payload())
    assert "refused: it holds posix.system, not plain data" in refusal(*flags, train=place != "test_batch")
    assert not mark.exists()
    rewrite(place)  # reads it as others do
    assert mark.exists()


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("data_batch_1", {"data": np.zeros((2, 3072))}, "cannot reshape array of size 49152 into shape (2,3072)"),
        ("data_batch_1", {"data": np.zeros((2, 3072), object)}, "a bytes-like object is required"),
        ("data_batch_1", {"data": [list(range(3072))]}, "its images, labels or names are damaged"),
        ("data_batch_1", {"labels": [1]}, "its images, labels or names are damaged"),
        ("data_batch_1", {"labels": 5}, "'int' object is not iterable"),
        ("batches.meta", {"label_names": list(range(10))}, "its images, labels or names are damaged"),
    ],
)
def test_damaged_pickles_are_refused(file, entries, message, cifar10):
    flags, rewrite = cifar10
    rewrite(file, **entries)
    assert message in refusal(*flags)
