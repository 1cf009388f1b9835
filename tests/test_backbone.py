"""Snippets of docs/backbone.md run unchanged, on little data."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT
from tiny_data import aedat2, events, image_folder, pixels

import models
from models.released import to_released

PAGE = (ROOT / "docs/backbone.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
CHECKS = [  # of the results of each snippet
    "logits.shape == (2, 100)",
    "[boxes.shape for _, boxes in answers] == [(2, 4, 24, 32), (2, 4, 12, 16), (2, 4, 6, 8)]",
    "logits.shape == (2, 100) and [next(s.parameters()).requires_grad for s in model.stages] == [False, False, True]",
    "(backbone.model.time_steps, backbone.model.ssa_membrane) == (4, 'released')",
    "top.values.shape == (1, 5) and image.shape == (1, 3, 224, 224)",
    "loss.isfinite() and all(p.grad is not None for p in model.parameters())",
    "len({group['lr_scale'] for group in optimizer.param_groups}) == 11",  # of 10 blocks and the first SPEDS
    "logits.shape == (1, 10) and frames.sum() == 500",
    "logits.shape == (1, 10) and state.steps == 16",
    "open_share.shape == (8, 32, 32) and 0 <= open_share.min() <= open_share.max() <= 1",
    "saliency.shape == (1, 32, 32) and saliency.any() and grad_cam.shape == (1, 8, 8)",
    "torch.equal(torch.stack(membranes) >= 1, spikes[name][0] > 0) and spikes[name][0].any()",
    "restored.attention == model.attention and all(map(same, restored.parameters(), model.parameters()))",
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Create a folder with the snippets' files, and the package under its installed name."""
    random = np.random.default_rng(0)
    Image.fromarray(pixels(0, 4, 40, random)).save(tmp_path / "cat.jpg")
    image_folder(tmp_path / "images", train=1, test=1)
    (tmp_path / "imagenet").symlink_to(ROOT / "imagenet")
    (tmp_path / "recording.aedat").write_bytes(aedat2(*events(0, 10, 500, random)))
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "models":
            monkeypatch.setitem(sys.modules, name.replace("models", "qkformer", 1), module)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("code", "check"), list(zip(SNIPPETS, CHECKS, strict=True)), ids=range(len(CHECKS)))
def test_snippets_run(code, check, workplace):
    if "10-384.pth" in code:
        torch.save({"model": to_released(models.create_model("qkformer_10_384"))}, "10-384.pth")
    namespace = {"same": torch.equal}
    torch.manual_seed(0)
    exec(code.replace("range(10)", "range(1)").replace("batch_size=16", "batch_size=4"), namespace)
    assert eval(check, namespace)


def test_scripts_of_timm_find_the_networks(workplace, monkeypatch, capsys):
    code = re.search(r"RUN='(.*)'", PAGE)[1]
    Path("train.py").write_text("import sys, timm; print(timm.create_model(sys.argv[1]).num_classes, __name__)")
    monkeypatch.setattr(sys, "argv", ["-c", "train.py", "qkformer_4_384.cifar100"])
    exec(code)
    assert capsys.readouterr().out == "100 __main__\n"
