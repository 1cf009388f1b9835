"""Fuzzed recipes and command lines: a Config, or one line of error.

Hypothesis makes them, always the same ones.
"""

import math

import pytest
import torch
import yaml
from harness import QUICK, repeated, script, trial
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import ROOT, refuses

from engine import checkpoint, config, run
from engine.cli import UserError

KEYS = st.one_of(
    st.sampled_from(list(config.FIELDS)), st.sampled_from(["variants", "<<", "1", ""]), st.text(max_size=9)
)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from([2**31, 2**63, -(2**63), 10**400, 1e308, 5e-324, math.inf, math.nan]),
)
CHOICES = sorted({str(c) for field in config.FIELDS.values() for c in field.metadata["choices"]})
TEXTS = st.one_of(
    st.sampled_from([*CHOICES, "1e-3", "none", "auto", "true", "qkformer_3_64", "qkformer_10_384", "1,2,3"]),
    st.sampled_from(
        ["~nobody/x", "/dev/zero", "/", "..", "\0", "x" * 5000, "9" * 5000, "\udcff", "١٢", "a:b", "rand-m9"]
    ),
    st.text(max_size=20),
)
SCALARS = st.one_of(NUMBERS, TEXTS, st.booleans(), st.none(), st.dates(), st.binary(max_size=9))
VALUES = st.recursive(
    SCALARS, lambda v: st.one_of(st.lists(v, max_size=9), st.dictionaries(SCALARS, v, max_size=4)), max_leaves=20
)
FRAGMENTS = [
    "lr: 1\n", "epochs: 2\n", "lr: 1\nlr: 2\n", "<<: {lr: 1}\n", "? [lr, 1]\n: 2\n", "? {a: b}\n: 2\n",
    "!!python/object/apply:os.system [ls]\n", "lr: !!python/name:os.system\n", "lr: !!binary aGk=\n",
    "lr: !!set {1, 2}\n", "lr: !!float x\n", "lr: !!int ''\n", "lr: !!timestamp x\n", "lr: !<x> 1\n", "lr: !!null x\n",
    "%YAML 9.9\n---\n", "---\nlr: 1\n---\nlr: 2\n", "...\n", "\t", "\0", "\ufeff", "lr: .nan\n", "lr: -.inf\n",
    "epochs: 0x" + "f" * 99 + "\n", "epochs: " + "9" * 5000 + "\n", "seed: 1" + ":59" * 99 + "\n",
    "mean: " + "[" * 2000 + "\n", "{" * 2000, "- " * 3000, "mean: " + "[" * 90 + "]" * 90 + "\n",
    "variants: {a: {lr: 1}, a: {}}\n", "variants: {a: {variants: {}}}\n", "'", '"\\', "|", ">9", '"\\ud800": 1\n',
    'model: "\\udcff"\n', 'data_path: "\\0"\n', "data_path: ~nobody/x\n", "model: \U0001f600\n",
]  # fmt: skip


def fitting(key):
    """Return valid values of a field, because only valid settings build networks."""
    field = config.FIELDS[key]
    low, high = (field.metadata[bound] for bound in ("low", "high"))
    numbers = st.floats(low or 0, min(high or 9, 9)) | st.integers(int(low or 0), int(min(high or 70, 70)))
    texts = st.sampled_from(field.metadata["choices"] or ["qkformer_3_64", "token", "self", "adamw", "digits", "none"])
    default = st.just(list(field.default) if isinstance(field.default, tuple) else field.default)
    return default | default | (st.booleans() if isinstance(field.default, bool) else numbers | texts | st.lists(texts))


FITTING = st.lists(st.sampled_from(sorted({*config.FIELDS} - {"config", "variant"})), max_size=8, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: fitting(key) for key in keys} | {"lr": st.just(1e-3)})
)


def as_yaml(value: dict) -> bytes:
    return yaml.dump(value, allow_unicode=True).encode(errors="surrogatepass")


FILES = st.one_of(
    st.dictionaries(KEYS, VALUES, max_size=8).map(as_yaml),
    FITTING.map(as_yaml),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=30)), max_size=4).map(
        lambda parts: "".join(parts).encode(errors="surrogatepass")
    ),
    st.binary(max_size=200),
)
FLAGS = st.one_of(
    st.sampled_from([f"--{key.replace('_', '-')}" for key in config.FIELDS]),
    st.sampled_from([f"--no-{key}" for key in config.FIELDS]),
    st.sampled_from(
        ["--local-rank", "-b", "-j", "--", "-", "--=", "--=1", "---", "@x", "--lr=", "--lr=1", "--dist-eval"]
    ),
    st.text(max_size=6).map(lambda text: f"--{text}"),
)
WORDS = st.one_of(TEXTS, st.text("0123456789.e-,", max_size=6))
LINES = st.lists(st.tuples(FLAGS, st.lists(WORDS, max_size=2)), max_size=4).map(
    lambda pairs: [word for flag, words in pairs for word in (flag, *words) if not word.startswith(("-h", "--help"))]
)


def examples(count):
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def check(cfg):
    """Build a network from valid settings on the meta device, or expect one line of error."""
    with torch.device("meta"):
        run.build_model(cfg)


@repeated(10, 500)
def test_recipes(count, tmp_path):
    path = tmp_path / "recipe.yml"

    def load(content):
        path.write_bytes(content)
        with trial(f"recipe {content[:500]!r}"):
            check(config.load(path))

    examples(count)(given(FILES)(load))()
    for fragment in FRAGMENTS:  # each alone, too
        load(fragment.encode(errors="surrogatepass"))


@repeated(30, 500)
def test_command_lines(count, finished, tmp_path, monkeypatch):
    """Run train.py and test.py in this process up to the data, and build the network if its settings are valid."""

    def no_data(cfg, *_, **__):
        check(cfg)
        raise UserError("the data would be loaded")

    @examples(count)
    @given(st.sampled_from(["digits/train.py", "digits/test.py", "cifar10/train.py", "imagenet/test.py"]), LINES)
    def start(name, words):
        more = ["--checkpoint", finished / "last.pt"] if "test.py" in name else []
        script(name, *words, *more, expected={0, 2})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "create_data", no_data)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    start()


@pytest.mark.parametrize("key", ["output-dir", "data-path", "resume", "checkpoint", "config"])
@pytest.mark.parametrize("name", ["a\0b", "a\udcffb"], ids=["zero byte", "not UTF-8"])
def test_names_that_tensorboard_cannot_write(key, name):
    with refuses(repr(name)[1:-1]):
        config.load(ROOT / "digits/digits.yml", [f"--{key}", name])


@pytest.mark.parametrize(("flag", "code"), [("--resume", 2), ("--finetune", 0)])
def test_settings_of_a_checkpoint_that_unfold(flag, code, finished, tmp_path):
    """Use a list that shares its parts: few bytes in a file, but 4^18 words if written out."""
    state, bomb = checkpoint.read(finished / "last.pt"), ["x"]
    for _ in range(18):
        bomb = [bomb] * 4
    checkpoint.save(tmp_path / "bomb.pt", state | {"config": state["config"] | {"attention": bomb}})
    words = [*QUICK, "--epochs", 1, flag, tmp_path / "bomb.pt", "--output-dir", tmp_path / "new"]
    assert "attention" in script("digits/train.py", *words, expected={code})
