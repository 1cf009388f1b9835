import os

import pytest
import torch
from tiny_data import cifar, image_folder, shards

from engine.log import logger

torch.set_num_threads(1)  # threads wait for each other on busy cores
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Write tiny data sets: imagenet, five (images to test), cifar10, cifar100, shards."""
    root = tmp_path_factory.mktemp("data")
    image_folder(root / "imagenet")
    image_folder(root / "five", train=4, test=1)
    cifar(root / "cifar10", 10, train=80, test=21)
    cifar(root / "cifar100", 100, train=100, test=21)
    shards(root / "shards")
    return root


@pytest.fixture
def one_core(monkeypatch):
    """Prepare event recordings in this process, because starting others takes long."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)


@pytest.fixture(autouse=True)
def no_lines():
    """Remove the handlers of scripts that ran in this process."""
    logger.handlers.clear()


@pytest.fixture
def warnings(monkeypatch):
    """Return the list of the engine's warnings."""
    messages = []
    monkeypatch.setattr(logger, "warning", messages.append)
    return messages


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Return the file that a `Payload` writes if its pickle runs."""
    monkeypatch.setenv("PAYLOAD_MARK", str(tmp_path / "ran"))
    return tmp_path / "ran"
