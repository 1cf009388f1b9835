"""Package `qkformer` as pip installs it, next to another package called `models`."""

import itertools
import os
import re
import shutil
import tomllib
import venv

import pytest
from scripts import ROOT, succeed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USE = """
import models, pathlib, pkgutil, timm, torch
import qkformer
from qkformer import LIF, create_model, list_models, released, set_lif_backend

assert models.other
for module in pkgutil.walk_packages(qkformer.__path__, "qkformer."):
    __import__(module.name)
model = create_model("qkformer_3_64", num_classes=7).eval()
assert type(timm.create_model("qkformer_3_64")) is type(model)
assert model(torch.rand(2, 1, 8, 8)).shape == (2, 7)
assert set(released.to_released(model)) == set(released.released_key_map(model))
print(pathlib.Path(qkformer.__file__).parent)
"""


@pytest.fixture
def source(tmp_path):
    """Copy the sources, because setuptools writes next to them."""
    for folder in ("models", "engine", "tests"):
        shutil.copytree(
            ROOT / folder, tmp_path / "source" / folder, ignore=shutil.ignore_patterns("__pycache__", "*.npz")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE", "hubconf.py"):
        shutil.copy(ROOT / file, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def other(tmp_path):
    """Write a folder with another package `models`."""
    (tmp_path / "other/models").mkdir(parents=True)
    (tmp_path / "other/models/__init__.py").write_text("other = True\n")
    return tmp_path / "other"


def test_the_package_holds_all_of_models_and_nothing_else(source, other, tmp_path):
    library = tmp_path / "library"
    setup = "from setuptools import setup; setup()"
    succeed("-c", setup, "-q", "build", "--build-lib", library, cwd=source)
    files = {path.relative_to(library / "qkformer") for path in library.rglob("*.py")}
    assert files == {path.relative_to(ROOT / "models") for path in (ROOT / "models").rglob("*.py")}
    assert [path.name for path in library.iterdir()] == ["qkformer"]
    output = succeed("-c", USE, cwd=tmp_path, PYTHONPATH=os.pathsep.join(map(str, (other, library))))
    assert output.split()[-1] == str(library / "qkformer")


@pytest.mark.slow
def test_pip_installs_it_into_an_empty_environment(source, other, tmp_path):
    """Borrow torch and timm from this environment."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    succeed("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", source, cwd=tmp_path)
    (library,) = (tmp_path / "venv").glob("lib/*/site-packages")
    assert not {"models", "engine", "tests"} & {path.name for path in library.iterdir()}
    output = succeed(
        "-c", USE, cwd=tmp_path, PYTHONPATH=os.pathsep.join(map(str, (other, library))), PYTHONSAFEPATH="1"
    )
    assert output.split()[-1] == str(library / "qkformer")


def test_what_pip_installs_is_what_the_tests_pin():
    """Compare all but the package itself; requirements.txt owns the versions."""
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    wanted = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} - {"qkformer"} == set(pinned)


def test_torch_hub_finds_every_network(other, tmp_path):
    """Load the networks after another package `models`."""
    code = f"""
import models, torch
assert models.other
arguments = {{"source": "local", "num_classes": 5}}
first = torch.hub.load({str(ROOT)!r}, "qkformer_2_64", **arguments)
torch.save(first.state_dict(), "weights.pth")
from_hub = torch.hub.load({str(ROOT)!r}, "qkformer_2_64", checkpoint_path="weights.pth", **arguments).eval()
assert torch.equal(from_hub.head.weight, first.head.weight)
assert from_hub(torch.rand(2, 3, 2, 16, 16)).shape == (2, 5)
import qkformer
with torch.device("meta"):
    networks = [torch.hub.load({str(ROOT)!r}, name, source="local") for name in qkformer.list_models()]
assert all(type(model).__module__.startswith("qkformer.") for model in networks)
"""
    succeed("-c", code, cwd=tmp_path, PYTHONPATH=other)
