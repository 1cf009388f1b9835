"""Imports between the files of the product: allowed arrows only, no circles, and none of the tests."""

import ast
import graphlib

import pytest
from scripts import ROOT

SCRIPTS = [p.parent.name for p in sorted(ROOT.glob("*/train.py"))]
PACKAGES = ("models", "engine", "analysis", "benchmarks", *SCRIPTS)
MAY_IMPORT = {  # package -> other packages that it may import
    "models": (),
    "engine": ("models",),
    "analysis": ("engine", "models"),
    "benchmarks": ("analysis", "engine", "models"),  # both use the command line of analysis.common
    **dict.fromkeys(SCRIPTS, ("engine",)),
}
RANKS = {  # a file may import files of equal and lower rank; the lowest is last
    "models": ["registry", "backends released", "fused", "qkformer", "backbone", "attention embed layers", "neuron"],
    "engine": [
        "run predict",
        "trainer evaluate weights run_dir data",
        "checkpoint optim log world config",
        "settings cli",
    ],
}
IMPORT_MODELS = ("engine.run", "engine.weights")  # the only ones in engine


def modules():
    """Return {name: file} of every module of the product."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = modules()


def imports(name, inside_functions=True):
    """Return the modules of product and tests that a module imports, the deepest of each import."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = ast.walk(tree) if inside_functions else tree.body
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    imported = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            deeper = {f"{base}.{alias.name}" for alias in node.names}
            imported |= {path for path in deeper if path in MODULES} | ({base} if deeper - MODULES.keys() else set())
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests"}
    return {path for path in imported if path in MODULES or path.split(".")[0] in tests}


def rank(name):
    """Return package and rank of a module, or None for files without a rank."""
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
    package, position = name.split(".")[0], rank(name)
    for target in imports(name):
        assert target.split(".")[0] in (package, *MAY_IMPORT[package]), target
        if position and (other := rank(target)) and other[0] == position[0]:
            assert other <= position, target
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
