"""Released files and those of other trainers in the scripts: evaluation, fine-tuning, resuming and recipes."""

import argparse
import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scripts import ROOT, fail, here, named, refuses, result_in, rows_in
from test_analysis import untrained
from timm.models import adapt_input_conv

from engine import checkpoint, config, weights
from engine.evaluate import published
from engine.run_dir import checkpoint_to_test
from engine.weights import build_model, load_weights
from models import create_model
from models.registry import identify
from models.released import to_released

SMALL = "--time-steps 1 --batch-size 8 --workers 0 --warmup-epochs 0 --num-classes 4 --input-size 32".split()


def released_file(path, name="qkformer_10_384", extra=(), **arguments):
    """Write a file in the format of the released ImageNet training, with random weights."""
    torch.manual_seed(0)
    content = {"model": to_released(create_model(name, **arguments)), "optimizer": {}, "epoch": 199, **dict(extra)}
    torch.save(content, path)
    return path


def test_the_released_flags_and_the_default_checkpoint(data, tmp_path, monkeypatch, capfd):
    """Evaluate the loaded weights with `--eval`; test.py takes the last run by default."""
    monkeypatch.chdir(tmp_path)
    released = "--model QKFormer_10_384 --time_step 1 --input_size 32 --batch_size 8 --accum_iter 1 --blr 1e-3"
    released += " --dist_eval --start_epoch 0 --num_workers 0 --nb_classes 4 --warmup_epochs 0 --pin_mem --aa none"
    released += " --dist_url env://"
    flags = [*released.split(), "--data_path", data / "five"]
    named(fail(monkeypatch, capfd, "imagenet/test.py"), "--checkpoint", "output/qkformer_10_384")
    (tmp_path / "output/digits").mkdir(parents=True)
    (tmp_path / "output/digits/best.pt").touch()  # `--output-dir output/digits`
    assert checkpoint_to_test(config.load(ROOT / "digits/digits.yml")) == Path("output/digits/best.pt")
    here(monkeypatch, capfd, "imagenet/train.py", *flags, "--epochs", "1")
    (folder,) = (tmp_path / "output/qkformer_10_384").iterdir()
    (recorded,), path = rows_in(folder), folder / "best.pt"
    for command in ("train.py --eval --resume", path), ("train.py --eval --finetune", path), ("test.py",):
        here(monkeypatch, capfd, *f"imagenet/{command[0]}".split(), *command[1:], *flags)
        result = result_in(folder)
        assert (result["loss"], result["top1"], result["count"]) == (recorded["test_loss"], recorded["test_top1"], 5)
        assert result["effective_batch"] == 8  # not the recipe's
        (folder / "best.test.json").unlink()


def test_a_known_file_is_evaluated_by_its_recipe(data, tmp_path, monkeypatch, capfd):
    path = released_file(tmp_path / "weights.pth", num_classes=4)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    assert weights.recipe_of(path, ROOT / "imagenet") is None
    monkeypatch.setitem(weights.RELEASED, digest, "qkformer_10_384")
    monkeypatch.setattr("engine.run.published", lambda cfg: config.load(cfg.config))
    flags = ["--data-path", data / "five", "--num-classes", "4", "--workers", "0"]
    here(monkeypatch, capfd, "imagenet/test.py", "--checkpoint", path, *flags, "--time-steps", 1)
    about = result_in(tmp_path)
    assert (about["model"], about["input_size"]) == ("qkformer_10_384", 224)
    assert about["published_top1"] == {"paper": 78.8, "log": 78.85}
    assert (about["ssa_membrane"], about["count"]) == ("released", 5)


def test_a_checkpoint_is_evaluated_by_the_recipe_of_its_run(tmp_path):
    def recipe(*flags, **recorded):
        state = {"format": "qkformer", "config": config.plain(config.load(ROOT / "imagenet/qkformer_10_768.yml"))}
        sources = config.read(ROOT / "imagenet/qkformer_10_384.yml", flags)
        cfg = weights.settings_of({**state, "config": state["config"] | recorded}, tmp_path / "best.pt", sources)
        return Path(cfg.config).stem

    assert recipe(recipe="qkformer_10_768") == "qkformer_10_768"
    assert recipe("--config", "qkformer_10_512", recipe="qkformer_10_768") == "qkformer_10_512"
    for unknown in ({}, {"recipe": "mine"}, {"recipe": "../cifar10/cifar10"}, {"recipe": "x" * 5000}, {"recipe": 3}):
        assert recipe(**unknown) == "qkformer_10_384"


def test_published_figures_are_shown_with_their_own_network_only():
    for name, arguments in (("qkformer_10_384", {}), ("qkformer_4_384", {"num_classes": 100})):
        variant, shown = identify(to_released(create_model(name, **arguments)))
        recipe = ROOT / ("cifar100/cifar100.yml" if arguments else "imagenet/qkformer_10_384.yml")
        assert published(config.load(recipe, [], {"model": variant, **shown})).log_top1
    for recipe, flags, figures in [
        ("qkformer_10_384", "", (78.8, 78.85)),
        ("qkformer_10_384", "--ssa-membrane per_sample --batch-size 7", (78.8, 78.85)),
        ("qkformer_10_384", "--model qkformer_10_512", (None, None)),
        ("qkformer_10_768", "", (84.22, 84.29)),
        ("qkformer_10_768_t1", "", (81.69, None)),
        ("qkformer_10_768_288", "", (85.25, 85.3)),
        ("qkformer_10_768_384", "--input-size 288", (None, None)),
        ("qkformer_10_384", "--dataset wds/mine", (78.8, 78.85)),
        ("qkformer_10_384", "--num-classes 4", (None, None)),
        ("../cifar100/cifar100", "--variant self", (81.23, None)),
        ("../cifar10/cifar10", "--dataset imagefolder", (None, None)),
        ("../cifar10-dvs/cifar10-dvs", "--dataset eventfolder", (None, None)),
    ]:
        cfg = published(config.load(ROOT / f"imagenet/{recipe}.yml", flags.split()))
        assert (cfg.paper_top1, cfg.log_top1) == figures
    assert len(weights.RELEASED) == 5
    assert all((ROOT / f"imagenet/{name}.yml").exists() for name in weights.RELEASED.values())


def test_an_unknown_file_is_known_by_its_shapes(data, tmp_path, monkeypatch, capfd):
    extra = {"args": argparse.Namespace(time_step=1, input_size=48)}
    for name, content, flags, expected in (
        ("a", {"extra": extra}, [], ("qkformer_10_384", 1, 48, "released", "sew")),
        ("b", {"residual": "ms"}, ["--input-size", "32"], ("qkformer_10_384", 4, 32, "per_sample", "ms")),
    ):
        (tmp_path / name).mkdir()
        path = released_file(tmp_path / name / "file.pth", num_classes=4, **content)
        test = ["imagenet/test.py", "--checkpoint", path, "--data-path", data / "five", "--workers", "0"]
        here(monkeypatch, capfd, *test, *flags)
        result = result_in(path.parent)
        keys = ("model", "time_steps", "input_size", "ssa_membrane", "residual")
        assert tuple(result[key] for key in keys) == expected
        assert result["epochs"] == 0  # so that no table counts it as a run of the recipe


def test_a_file_of_a_rival_is_evaluated_with_the_variant_of_its_name(data, tmp_path, monkeypatch, capfd):
    """Take the number of heads and the statistics of the images, which shapes do not show."""
    small = ["--data-path", data / "five", "--dataset", "imagefolder", "--workers", "0"]
    for name, heads, mean in (("spikingformer_4_384", 8, 0.4914), ("sdt_2_512", None, 0.5071)):
        path = released_file(tmp_path / f"{name}.pth", name, num_classes=4)
        here(monkeypatch, capfd, "cifar100/test.py", "--checkpoint", path, *small, "--output-dir", tmp_path / name)
        result = result_in(tmp_path / name)
        assert (result["model"], result["variant"], result["heads"], result["mean"][0]) == (name, name, heads, mean)
    here(monkeypatch, capfd, "cifar100/test.py", "--checkpoint", path, *small, "--model", name)
    assert result_in(tmp_path)["variant"] is None


def test_fine_tuning_and_resuming_from_released_weights(data, tmp_path, monkeypatch, capfd):
    network = {"name": "qkformer_3_64", "in_channels": 3}
    weights = checkpoint.read(released_file(tmp_path / "released.pth", num_classes=1000, **network))["state_dict"]
    small = [*"imagenet/train.py --model qkformer_3_64 --lr 0 --warmup-lr 0 --min-lr 0".split(), *SMALL]
    small += ["--data-path", data / "five"]
    tune = ["--finetune", tmp_path / "released.pth", "--epochs", "1", "--output-dir", tmp_path / "tuned"]
    here(monkeypatch, capfd, *small, *tune)
    model = create_model(**network, num_classes=4)
    model.load_state_dict(checkpoint.read(tmp_path / "tuned/last.pt")["state_dict"])
    tuned = to_released(model)
    assert all(torch.equal(tuned[key], weights[key]) for key in tuned if key.endswith("conv.weight"))
    assert 1e-5 < tuned["head.weight"].std() < 3e-5
    assert not tuned["head.bias"].any()

    (tmp_path / "resumed").mkdir()
    path = released_file(tmp_path / "resumed/four.pth", num_classes=4, **network)  # in the folder of the new run
    here(monkeypatch, capfd, *small, "--resume", path, "--output-dir", tmp_path / "resumed", "--epochs", "201")
    assert [row["epoch"] for row in rows_in(tmp_path / "resumed")] == [200]
    assert checkpoint.read(tmp_path / "resumed/last.pt")["epoch"] == 201
    named(fail(monkeypatch, capfd, *small, "--resume", tmp_path / "released.pth"), "head.weight")
    torch.save(weights, tmp_path / "bare.pth")
    named(fail(monkeypatch, capfd, *small, "--resume", path, "--output-dir", tmp_path / "done"), path, "epochs = 200")
    line = fail(monkeypatch, capfd, *small, "--resume", tmp_path / "bare.pth")
    named(line, tmp_path / "bare.pth", "--finetune")


def test_a_recipe_named_on_the_command_line_is_not_ignored_by_a_resumed_run(tmp_path, monkeypatch, capfd):
    """Train at 384, not at 224, with `--config ..._384 --resume last.pt`."""
    quick = ["--batch-size", "480", "--epochs", "1", "--time-steps", "1"]
    here(monkeypatch, capfd, "digits/train.py", *quick, "--output-dir", tmp_path / "run")
    other = tmp_path / "other.yml"
    other.write_text((ROOT / "digits/digits.yml").read_text() + "clip_grad: 1\n")
    again = ["digits/train.py", "--config", other, *quick, "--resume", tmp_path / "run/last.pt"]
    line = fail(monkeypatch, capfd, *again)
    named(line, tmp_path / "run/last.pt", "clip_grad", 1.0, "--output-dir")
    here(monkeypatch, capfd, *again, "--output-dir", tmp_path / "branch", "--epochs", "2")


FIRST = "stages.0.embed.units.0.conv.weight"


def prefixed(prefix, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def timm_file(weights):
    args = argparse.Namespace(model="qkformer_3_64", aa=None)
    return {"epoch": 3, "arch": args.model, "state_dict": prefixed("module.", weights), "args": args}


def averaged_timm_file(weights):
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    return {"arch": "qkformer_3_64", "state_dict": zeros, "state_dict_ema": weights}


def lightning_file(weights):
    content = {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.5.0", "callbacks": {}, "loops": {}}
    return content | {"state_dict": prefixed("model._orig_mod.", weights), "hyper_parameters": {"lr": 1}}


FILES = {"timm.pth.tar": timm_file, "ema.pth.tar": averaged_timm_file, "lightning.ckpt": lightning_file}


@pytest.mark.parametrize("name", [*FILES, "weights.safetensors"])
def test_a_file_of_another_trainer_is_evaluated_and_fine_tuned(name, tmp_path, monkeypatch, capfd):
    best, quick = untrained(tmp_path / "best.pt", "digits/digits.yml"), ["--time-steps", 1]
    weights = checkpoint.read(best)["state_dict"]
    path = tmp_path / "theirs" / name
    path.parent.mkdir()
    torch.save(FILES[name](weights), path) if name in FILES else save_file(weights, path)
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", best, *quick)
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", path, *quick)
    expected, actual = result_in(tmp_path), result_in(path.parent)
    assert actual["top1"] == expected["top1"]
    assert math.isclose(actual["loss"], expected["loss"], rel_tol=1e-6)
    cfg = config.load(ROOT / "digits/digits.yml", ["--finetune", str(path)])
    model = build_model(cfg)
    load_weights(cfg, model, checkpoint.read(cfg.finetune), cfg.finetune, adapt=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "leaks"), [("qkformer_4_384", True), ("spikformer_4_384", False)])
def test_only_released_files_of_qkformer_warn_of_the_leaking_membrane(name, leaks, tmp_path, warnings):
    path = released_file(tmp_path / "file.pth", name)
    cfg = config.load(ROOT / "cifar10/cifar10.yml", ["--model", name, "--ssa-membrane", "per_sample"])
    weights.warn_of_other_network(cfg, checkpoint.read(path), path)
    assert any("ssa_membrane" in line for line in warnings) == leaks


def model_of(channels, *flags):
    cfg = config.load(ROOT / "cifar10/cifar10.yml", ["--in-channels", str(channels), *flags])
    return cfg, build_model(cfg)


@pytest.mark.parametrize("names", [lambda model: model.state_dict(), to_released])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 2), (3, 5), (2, 1)])
def test_fine_tuning_adapts_the_first_convolution_as_timm_does(before, after, names):
    source, (cfg, model) = model_of(before)[1], model_of(after, "--num-classes", "7")
    state = {"state_dict": {key: value.clone() for key, value in names(source).items()}}
    load_weights(cfg, model, state, "theirs.pt", adapt=True)
    expected = adapt_input_conv(after, source.state_dict()[FIRST])
    assert torch.equal(model.state_dict()[FIRST], expected)
    assert torch.equal(model.stages[0].blocks[0].attn.q.conv.weight, source.stages[0].blocks[0].attn.q.conv.weight)
    with refuses("theirs.pt"):
        load_weights(cfg, model, state, "theirs.pt")  # evaluations load strictly


def test_grey_weights_answer_alike_on_grey_images_in_three_channels():
    """Adapt 1 channel to 3, which timm does not."""
    source, (cfg, model) = model_of(1)[1], model_of(3)
    load_weights(cfg, model, {"state_dict": source.state_dict()}, "theirs.pt", adapt=True)
    images, first = torch.rand(2, 1, 32, 32), "stages.0.embed.units.0.conv"
    actual = model.get_submodule(first)(images.expand(-1, 3, -1, -1))
    assert torch.allclose(actual, source.get_submodule(first)(images), atol=1e-6)
