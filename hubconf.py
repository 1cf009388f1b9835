"""Networks for torch.hub: `torch.hub.load(FOLDER, "qkformer_4_384", source="local", num_classes=100)`."""

import functools
import importlib.util
import pathlib
import sys

dependencies = ["torch", "timm"]


def _import_as(name: str, folder: pathlib.Path):
    """Import a folder as the package `name`, because a program may have its own package `models`."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


_qkformer = sys.modules.get("qkformer") or _import_as("qkformer", pathlib.Path(__file__).parent / "models")
globals().update({name: functools.partial(_qkformer.create_model, name) for name in _qkformer.list_models()})
