"""README and the pages in docs/: their commands, snippets, links and figures."""

import importlib.util
import json
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch
import torchvision.datasets.cifar
import yaml
from PIL import Image
from scripts import ROOT, here, succeed
from test_event_folder import recordings_of_the_page
from test_install import PROJECT

from engine import config
from engine.weights import RELEASED
from models import create_model, list_models
from models.released import to_released

PAGES = {page.stem: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
BLOCKS = [(page, kind, code) for page, text in PAGES.items() for kind, code in FENCE.findall(text)]
COMMANDS = {page: [] for page in PAGES}  # page -> commands of its bash blocks, without repeated ones
SHORT = "--epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --workers 0".split()
SMALL = {  # flags that shorten the commands of each folder
    "digits": ["--epochs", "1", "--batch-size", "128"],
    "imagenet": [*SHORT, *"--model qkformer_3_64 --num-classes 4 --input-size 8 --batch-size 8".split()],
    "cifar10": [*SHORT, *"--model qkformer_3_64 --input-size 8 --batch-size 40".split()],
    "cifar100": [*SHORT, *"--model qkformer_3_64 --input-size 8 --batch-size 40".split()],
    "digits-dvs": "--epochs 1 --batch-size 128".split(),
    "dvs128-gesture": [*SHORT, *"--model qkformer_2_64 --batch-size 8".split()],
    "cifar10-dvs": [*SHORT, *"--model qkformer_2_64 --batch-size 8".split()],
    "eventfolder": "--num-classes 2 --batch-size 4".split(),
    "analysis.export": "--format safetensors".split(),  # test_export.py covers ONNX, whose import takes long
    "analysis.membrane": "--batch-sizes 60 120 --shuffles 2".split(),
    "benchmarks.speed": "--models qkformer_3_64 --modes eval --rounds 1 --steps 1 --time-steps 1".split(),
    "benchmarks.growth": "--axes batch_size tokens --batch-size 1 2 --tokens 4 16 --rounds 1 --steps 1".split(),
    "benchmarks.loader": "--cases cifar10 --repeats 1 --batches 1".split(),
}
for page, kind, code in BLOCKS:
    lines = [line for line in code.splitlines() if kind == "bash" and line and not line.startswith("#")]
    before = {line for lines in COMMANDS.values() for line in lines}
    COMMANDS[page] += [line for line in lines if line not in before or "cd imagenet" in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write tiny data sets to the folders of the commands."""
    root = tmp_path_factory.mktemp("pages") / "data"
    tiny_data.image_folder(root / "imagenet", train=8, test=1)
    tiny_data.cifar(root / "cifar10", 10, train=80, test=10)
    tiny_data.cifar(root / "cifar100", 100, train=80, test=10)
    tiny_data.dvs128_gesture(root / "dvs128-gesture", train=1, test=1, count=50)
    tiny_data.cifar10_dvs(root / "cifar10-dvs", per_class=2, count=50)
    recordings_of_the_page(root)
    shapes = tiny_data.image_folder(root / "shapes", train=4, test=2)
    for part in ("train", "val"):
        (shapes / part / "n00000000").rename(shapes / part / "circle")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(shapes / "val/circle/9.png")
    shutil.copytree(shapes / "train", root / "photos")
    return root


@pytest.fixture
def workplace(tmp_path, data, monkeypatch, one_core):
    """Create a folder for the output, with the files that the commands read."""
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "weights").mkdir()
    torch.save({"model": to_released(create_model("qkformer_10_384", num_classes=4))}, tmp_path / "weights/10-384.pth")
    for module in (torchvision.datasets.cifar, torchvision.datasets.utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


LONG = ("recipes", "analyses", "membrane")  # pages whose commands take more than ten seconds
CASES = [
    pytest.param(page, marks=[pytest.mark.slow] * (page in LONG)) for page, commands in COMMANDS.items() if commands
]


@pytest.mark.parametrize("page", CASES)
def test_the_commands_of_a_page_run_in_order(page, workplace, data, monkeypatch, capfd):
    """Run commands, then Python, unchanged but short and on tiny data; torch.distributed.launch starts two ranks."""
    folder = workplace
    every = [*COMMANDS[page], *(line for lines in COMMANDS.values() for line in lines)]

    def execute(command):
        words = shlex.split(command)
        for needed in re.findall(r"output/([\w-]+)/(?:best|last)\.\w+", command):
            if not (workplace / "output" / needed).exists():  # made on another page
                execute(next(c for c in every if "train.py" in c and f"output/{needed}" in c.split()))
        if words[1] == "-m" and not words[2].startswith("torch."):
            here(monkeypatch, capfd, words[2], *words[3:], *SMALL.get(words[2], []))
            return
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, flags = (folder / words[at]).relative_to(workplace), words[at + 1 :]
        name = script.parent.name
        if script.name == "train.py":
            flags = [
                "--time-steps",
                "1",
                *flags,
                *SMALL[name],
                *(SMALL["eventfolder"] if "eventfolder" in flags else []),
            ]
        else:
            flags += ["--workers", "0"]
        if (data / name).exists() and "--data-path" not in flags:
            flags += ["--data-path", data / name] if script.name == "train.py" or "--checkpoint" not in flags else []
        if "weights/10-384.pth" in flags:
            flags += ["--input-size", "32", "--time-steps", "1"]
        if "output/10-768-384" in flags:
            flags += ["--epochs", "2"]  # continues after the previous run's one epoch
        if "torch.distributed.launch" in words:
            start = ["-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2"]
            succeed(*start, ROOT / script, *flags, cwd=folder)
        else:
            here(monkeypatch, capfd, str(script), *flags)

    for command in COMMANDS[page]:
        if command.startswith("cd "):
            folder = (folder / command.removeprefix("cd ")).resolve()
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
        else:
            execute(command)
    for block, kind, code in BLOCKS:
        if (block, kind) == (page, "python"):
            namespace = {}
            exec(code, namespace)
            if page == "README":
                assert not namespace["logits"].any()
                assert [y.shape[1:] for y in namespace["maps"]] == [(96, 16, 16), (192, 8, 8), (384, 4, 4)]
                assert (namespace["answer"].shape, namespace["state"].steps) == ((1, 10), 16)


def test_every_block_says_if_it_runs():
    """Run bash and python blocks only; sh blocks state their needs, and text blocks are output or layouts."""
    for page, kind, code in BLOCKS:
        assert kind in ("bash", "sh", "python", "text"), f"{page}: {code}"
        assert kind != "sh" or code.startswith("# needs "), f"{page}: {code}"
        assert kind != "python" or page == "backbone" or COMMANDS[page], f"{page}: {code}"  # test_backbone.py


def test_commands_that_do_not_run_here_have_valid_flags():
    """Check commands of sh blocks, sentences and tables."""
    spans = [span for text in PAGES.values() for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]
    checked = set()
    for line in [*spans, *(line for _, kind, code in BLOCKS if kind == "sh" for line in code.splitlines())]:
        for module in re.findall(r"python -m ([a-z_]+\.[a-z_]+)", line):
            assert importlib.util.find_spec(module), line
        if script := re.search(r"([\w-]+)/(train|test)\.py (.*)", line):
            folder, name, flags = script.groups()
            recipe = re.search(r"[\w-]+\.yml", (ROOT / folder / f"{name}.py").read_text())[0]
            words = shlex.split(flags)
            if words != ["--help"]:
                config.load(ROOT / folder / recipe, words)
            checked.add(folder)
    assert checked >= {"imagenet", "cifar10", "cifar100", "digits", "cifar10-dvs", "dvs128-gesture"}


def test_make_targets_exist():
    code = [
        *(code for _, kind, code in BLOCKS if kind == "text"),
        *re.findall(r"`(make [^`]+)`", "".join(PAGES.values())),
    ]
    targets = {target for lines in code for target in re.findall(r"(?:^|&& )make (\w+)", lines, re.M)}
    assert targets >= {"demo", "test", "tables", "audit", "help"}
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)


def test_the_readme_fits_on_a_few_screens():
    lines = PAGES["README"].splitlines()
    assert len(lines) <= 170
    assert not [line for line in lines if len(line) > (100 if line.startswith("|") else 120)]


def test_the_tables_are_what_the_results_give(tmp_path, monkeypatch, capfd):
    arguments = ["--results", ROOT / "docs/results", "--output-dir", tmp_path]
    here(monkeypatch, capfd, "analysis.tables", *arguments)
    shown = PAGES["results"].split("--results docs/results -->\n")[1].split("<!-- end -->")[0]
    assert shown.strip() == (tmp_path / "tables.md").read_text().strip()


def anchors(page):
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for name, text in PAGES.items():
        folder = ROOT if name == "README" else ROOT / "docs"
        for file, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if not file.startswith("https://"):
                assert (folder / file).exists(), f"{name}: {file}"
                assert not anchor or anchor in anchors(PAGES[Path(file).stem or name]), f"{name}: {file}#{anchor}"


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def row_of(page, start):
    """Return the cells of the only row in a page's tables with this start."""
    (row,) = [line for line in PAGES[page].splitlines() if line.startswith(f"| {start}")]
    return cells(row)


def test_the_table_of_recipes_is_complete():
    for path in ROOT.glob("*/*.yml"):
        if not (path.parent / "train.py").exists():
            continue
        cfg = config.load(path)
        _, network, batch, _, paper, log, hours = row_of("recipes", f"`{path.relative_to(ROOT)}`")
        assert network.endswith(f", {cfg.time_steps}, {cfg.input_size}")
        assert batch.endswith(f"{cfg.effective_batch or cfg.batch_size}")
        assert bool(paper) == bool(cfg.paper_top1)
        assert not paper or float(paper.split(" %")[0]) == cfg.paper_top1
        assert (float(log.removesuffix(" %")) if log else None) == cfg.log_top1
        gpus = 8 if path.parent.name == "imagenet" else 1
        assert (
            hours in ("0", "?") if cfg.log_hours is None else float(hours) == pytest.approx(gpus * cfg.log_hours, 0.03)
        )


def test_the_results_of_the_readme_are_those_of_recipes_and_runs():
    rows = [line for line in PAGES["README"].splitlines() if line.endswith(".yml) |")]
    assert 6 < len(rows) < 9
    for line in rows:
        recipe = re.search(r"\(([\w/-]+\.yml)\)", line)[1]
        cfg = config.load(ROOT / recipe)
        _, parameters, steps, size, *figures, _ = cells(line)
        settings = {"num_classes": cfg.num_classes} | ({"mlp_ratio": cfg.mlp_ratio} if cfg.mlp_ratio else {})
        count = sum(p.numel() for p in create_model(cfg.model, **settings).parameters())
        assert parameters == f"{count / 1e6:.2f} M"
        assert (int(steps), int(size)) == (cfg.time_steps, cfg.input_size)
        runs = [
            json.loads(path.read_text())
            for path in (ROOT / "docs/results").glob(f"{Path(recipe).stem}-seed*/*.test.json")
        ]
        here_top1 = round(statistics.mean(run["top1"] for run in runs), 2) if runs else None
        assert [float(figure) if figure else None for figure in figures] == [cfg.paper_top1, cfg.log_top1, here_top1]


def test_the_checksums_are_those_that_are_recognised():
    assert re.findall(r"`([0-9a-f]{32})`", PAGES["checkpoints"]) == [*RELEASED]


def test_every_network_is_in_the_table():
    for name in list_models():
        count = sum(p.numel() for p in create_model(name).parameters())
        assert f"{count:,}" in row_of("backbone", f"`{name}`")[-1]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert len(citation["preferred-citation"]["authors"]) == 10
