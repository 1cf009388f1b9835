"""Commands, code, tables and links of the README."""

import re
import shlex
import subprocess

import pytest
import torch
import torchvision.datasets.cifar
from scripts import ROOT, here, succeed
from tiny_data import cifar, cifar10_dvs, dvs128_gesture, image_folder

from engine import config
from engine.weights import RELEASED
from models import create_model, list_models
from models.released import to_released

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS, ELSEWHERE = (
    [[line for line in block.splitlines() if line] for kind, block in BLOCKS if kind == k] for k in ("bash", "")
)
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
SHORT = "--epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --time-steps 1 --workers 0".split()
SMALL = {  # what makes a command of each folder short
    "digits": ["--epochs", "1", "--time-steps", "1", "--batch-size", "128"],
    "imagenet": [*SHORT, *"--model qkformer_3_64 --num-classes 4 --input-size 8 --batch-size 8".split()],
    "cifar10": [*SHORT, *"--model qkformer_3_64 --input-size 8 --batch-size 40".split()],
    "cifar100": [*SHORT, *"--model qkformer_3_64 --input-size 8 --batch-size 40".split()],
    "digits-dvs": "--epochs 1 --time-steps 1 --batch-size 128".split(),
    "dvs128-gesture": [*SHORT, *"--model qkformer_2_64 --batch-size 8".split()],
    "cifar10-dvs": [*SHORT, *"--model qkformer_2_64 --batch-size 8".split()],
    "analysis.export": "--format safetensors".split(),  # test_export.py has ONNX, which takes long to import
    "analysis.membrane": "--batch-sizes 60 120 --shuffles 2".split(),
    "benchmarks.speed": "--models qkformer_3_64 --modes eval --rounds 1 --steps 1 --time-steps 1".split(),
    "benchmarks.growth": "--axes batch_size tokens --batch-size 1 2 --tokens 4 16 --rounds 1 --steps 1".split(),
    "benchmarks.loader": "--cases cifar10 --repeats 1 --batches 1".split(),
}


def test_make_targets_exist():
    for command in ("make demo", "make test"):
        assert [command] in COMMANDS
        subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny data sets where the commands expect them."""
    root = tmp_path_factory.mktemp("readme") / "data"
    image_folder(root / "imagenet", train=8, test=1)
    cifar(root / "cifar10", 10, train=80, test=10)
    cifar(root / "cifar100", 100, train=80, test=10)
    dvs128_gesture(root / "dvs128-gesture", train=1, test=1, count=50)
    cifar10_dvs(root / "cifar10-dvs", per_class=2, count=50)
    return root


@pytest.fixture
def workplace(tmp_path, data, monkeypatch, one_core):
    """A folder for the output, with a released checkpoint."""
    (tmp_path / "weights").mkdir()
    torch.save({"model": to_released(create_model("qkformer_10_384", num_classes=4))}, tmp_path / "weights/10-384.pth")
    for module in (torchvision.datasets.cifar, torchvision.datasets.utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", [b for b in COMMANDS if not b[0].startswith("make")], ids=lambda block: block[-1])
def test_the_commands_of_a_block_run_in_order(block, workplace, data, monkeypatch, capfd):
    folder = workplace
    every = [command for commands in COMMANDS for command in commands]

    def execute(command):
        words = shlex.split(command)
        for needed in re.findall(r"output/([\w-]+)/(?:best|last)\.\w+", command):
            if not (workplace / "output" / needed).exists():  # made in another block
                execute(next(c for c in every if "train.py" in c and f"--output-dir output/{needed}" in c))
        if words[:2] == ["python", "-m"] and words[2].startswith(("analysis.", "benchmarks.")):
            here(monkeypatch, capfd, words[2], *words[3:], *SMALL.get(words[2], []))
            return
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script = (folder / words[at]).relative_to(workplace)
        name = script.parent.name
        flags = [*words[at + 1 :], *(SMALL[name] if script.name == "train.py" else ["--workers", "0"])]
        flags += ["--data-path", data / name]
        if "weights/10-384.pth" in flags:
            flags += ["--input-size", "32", "--time-steps", "1"]
        if "output/10-768-384" in flags:
            flags += ["--epochs", "2"]  # goes on after the one epoch of the run before
        if "torch.distributed.launch" in words:
            start = "-m torch.distributed.launch --standalone --nproc_per_node=2".split()
            succeed(*start, ROOT / script, *flags, cwd=folder)
        else:
            here(monkeypatch, capfd, str(script), *flags)

    for command in block:
        if command.startswith("cd "):
            folder = (folder / command.removeprefix("cd ")).resolve()
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
        elif not command.startswith("source "):
            execute(command)


def test_the_tables_are_what_the_results_give(tmp_path, monkeypatch, capfd):
    arguments = ["--results", ROOT / "docs/results", "--output-dir", tmp_path]
    here(monkeypatch, capfd, "analysis.tables", *arguments)
    page = (ROOT / "docs/results.md").read_text()
    shown = page.split("--results docs/results -->\n")[1].split("<!-- end -->")[0]
    assert shown.strip() == (tmp_path / "tables.md").read_text().strip()


def test_pictures_and_pages_are_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert len(pages) >= 3
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text()):
            target = "".join(link)
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_commands_for_other_machines_have_valid_flags():
    lines = [line for block in ELSEWHERE for line in block if "imagenet/train.py" in line]
    assert len(lines) == 2
    for line in lines:
        flags = shlex.split(line.split("imagenet/train.py")[1])
        assert config.load(ROOT / "imagenet/qkformer_10_384.yml", flags).output_dir


def test_the_table_of_recipes_is_complete():
    for path in ROOT.glob("*/*.yml"):
        if not (path.parent / "train.py").exists():
            continue
        cfg = config.load(path)
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{path.relative_to(ROOT)}`")]
        assert f", {cfg.time_steps}, {cfg.input_size} | " in row
        assert f"{cfg.effective_batch or cfg.batch_size} | " in row
        for figure in (cfg.paper_top1, cfg.log_top1):
            assert figure is None or f"| {figure:.2f} %" in row or f"| {figure} %" in row


def test_the_checksums_are_those_that_are_recognised():
    assert re.findall(r"`([0-9a-f]{32})`", README) == [*RELEASED]


@pytest.mark.parametrize(("code", "shape"), list(zip(PYTHON, [(2, 100), (1, 11)], strict=True)))
def test_python_examples_run(code, shape):
    namespace = {}
    exec(code, namespace)
    assert namespace["logits"].shape == shape


def test_every_network_is_in_the_table():
    for name in list_models():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        assert f"{sum(p.numel() for p in create_model(name).parameters()):,}" in row
