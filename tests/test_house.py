"""Imports between the files of the product: who may use whom, without circles, and nothing uses the tests."""

import ast
import graphlib

import pytest
from scripts import ROOT

SCRIPTS = [p.parent.name for p in sorted(ROOT.glob("*/train.py"))]
PACKAGES = ("models", "engine", "analysis", "benchmarks", *SCRIPTS)
MAY_IMPORT = {  # package -> the others that it may import
    "models": (),
    "engine": ("models",),
    "analysis": ("engine", "models"),
    "benchmarks": ("analysis", "engine", "models"),  # analysis.common is the command line of both
    **dict.fromkeys(SCRIPTS, ("engine",)),
}
RANKS = {  # a file may import files of its own and of lower ranks, the lowest last
    "models": ["registry", "backends released", "fused", "qkformer", "backbone", "attention embed layers", "neuron"],
    "engine": [
        "run predict",
        "trainer evaluate weights run_dir data",
        "checkpoint optim log world config",
        "settings cli",
    ],
}
IMPORT_MODELS = ("engine.run", "engine.weights")  # of the engine, these alone


def modules():
    """{name: file} of every module of the product."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = modules()


def imports(name, inside_functions=True):
    """Modules of the product (and tests) that a module imports, the deepest that each import names."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = ast.walk(tree) if inside_functions else tree.body
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            deeper = {f"{base}.{alias.name}" for alias in node.names}
            found |= {path for path in deeper if path in MODULES} | ({base} if deeper - MODULES.keys() else set())
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests"}
    return {path for path in found if path in MODULES or path.split(".")[0] in tests}


def rank(name):
    """Package and number of the rank of a module; None for files that no rank names."""
    package, _, rest = name.partition(".")
    for i, names in enumerate(reversed(RANKS.get(package, []))):
        if rest.split(".")[0] in names.split():
            return package, i
    return None


def test_the_graph_is_of_the_whole_product():
    assert {"models.fused.kernels.pool", "engine.data.loaders", "analysis.tables", "digits.train"} <= MODULES.keys()
    assert "models.fused.autograd" in imports("models.backends")  # inside a function
    assert "models.neuron" in imports("models.fused.kernels.token_attention")


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name):
    package, own = name.split(".")[0], rank(name)
    for target in imports(name):
        assert target.split(".")[0] in (package, *MAY_IMPORT[package]), target
        if own and (other := rank(target)) and other[0] == own[0]:
            assert other <= own, target
        if target.split(".")[0] == "models" and package == "engine":
            assert name in IMPORT_MODELS, target


@pytest.mark.parametrize(("package", "inside_functions"), [("models", True), ("engine", False)])
def test_no_circles(package, inside_functions):
    graph = {
        name: {target for target in imports(name, inside_functions) if target.startswith(package)} - {name}
        for name in MODULES
        if name.startswith(package)
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
