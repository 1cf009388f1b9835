"""Settings from defaults, recipe, checkpoint and flags; mistakes give one line."""

import pytest
import yaml
from scripts import ROOT, here, named, refuses

from engine import config, optim, weights

RECIPES = sorted(path for path in ROOT.glob("*/*.yml") if (path.parent / "train.py").exists())


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yml"
        path.write_text(text)
        return path

    return write


def test_flags_beat_the_checkpoint_beats_the_recipe_beats_defaults(recipe):
    path = recipe("lr: 1e-3\nepochs: 7\ntime_steps: 2\nbatch_size: 8\n")
    recorded = {"time_steps": 3, "batch_size": 4, "output_dir": "elsewhere", "a_setting_of_another_version": 1}
    cfg = config.load(path, ["--batch-size", "16"], recorded)
    assert cfg.output_dir is None  # belongs to the command, not to the run
    assert (cfg.lr, cfg.epochs, cfg.time_steps, cfg.batch_size, cfg.accum_iter) == (1e-3, 7, 3, 16, 1)


def test_both_spellings_of_a_flag_and_every_kind_of_value(recipe):
    path = recipe("lr: 1\n")
    argv = "--batch_size 4 --time_step 2 --mean 0.1 0.2 0.3 --std .1,.2,.3 --no-shortcut --decay_1d".split()
    cfg = config.load(path, [*argv, "--attention", "token", "self", "self"])
    assert (cfg.batch_size, cfg.time_steps, cfg.lr) == (4, 2, 1.0)
    assert cfg.mean == cfg.std == (0.1, 0.2, 0.3)
    assert (cfg.shortcut, cfg.decay_1d, cfg.attention) == (False, True, ("token", "self", "self"))
    assert config.load(path, ["--auto-augment", "none", "--local_rank=1", "--local-rank", "0"]).auto_augment is None


def test_another_recipe_can_be_named(recipe):
    assert config.load("missing.yml", ["--config", str(recipe("lr: 0.25\n"))]).lr == 0.25


def test_the_saved_configuration_reads_back(recipe, tmp_path):
    cfg = config.load(recipe("lr: 0.1\nattention: [token, self, self]\nmixup: 0.5\n"))
    path = tmp_path / "saved.yml"
    path.write_text(yaml.safe_dump(config.plain(cfg, without=["config", "variant"])))
    assert config.plain(config.load(path), without=["config", "variant"]) == config.plain(
        cfg, without=["config", "variant"]
    )


@pytest.mark.parametrize(
    ("text", "flags", "value"),
    [
        ("lr: 1\n3: 3", "", "3"),
        ("lr: 1\nfoo: 3\nepochz: 3\nbar: 1", "", "epochs"),
        ("lr: 1\nfoo: 3\nepochz: 3\nbar: 1", "", "bar"),
        ("lr: 1\nimg_size: 32\ninput_size: 64", "", "img_size"),
        ("lr: 1\nvflip: 0.5", "", "vflip"),
        ("lr: fast", "", "fast"),
        ("lr: 1\nepochs: 2.5", "", "2.5"),
        ("lr: 1\nepochs: [3]", "", "[3]"),
        ("lr: 1\nepochs:", "", "epochs"),
        ("lr: 1\nshortcut: 1", "", "shortcut"),
        ("lr: 1\nmean: [a, b, c]", "", "'a'"),
        ("lr: 1\nhflip: 1.5", "", "1.5"),
        ("lr: .nan", "", "nan"),
        ("lr: 1\nresidual: add", "", "add"),
        ("lr: 1\nscale: [1]", "", "scale"),
        ("epochs: 3", "", "blr"),
        ("lr: 1\nmixup: 1\nbatch_size: 3", "", "batch_size"),
        ("", "", "recipe.yml"),
        ("lr: [1", "", "recipe.yml"),
        ("lr: !!python/object/apply:os.system [ls]", "", "recipe.yml"),
        ("lr: 1\nlr: 2", "", "'lr'"),
        ("lr: 1\nstd: [0, 1, 1]", "", "std"),
        ("lr: 1\nscale: [0.5, 0.1]", "", "scale"),
        ("lr: 1\nseed: 4294967296", "", "4294967296"),
        ("lr: 1", "--time-steps 99999999999999999999", "1024"),
        ("lr: 1", "--foo 3 --bar", "--bar"),
        ("lr: 1", "--epochs=x", "'x'"),
        ("lr: 1", "--epoch 3", "--epoch"),
        ("lr: 1", "--batch-size -1", "-1"),
        ("lr: 1", "--variant short", "recipe.yml"),
        ("lr: 1\nvariants: {a: {lr: 2}}", "--variant b", "--variant b"),
        ("lr: 1\nvariants: {a: {lrr: 2}}", "", "lrr"),
        ("lr: 1\nvariants: {a: 3}", "", "recipe.yml"),
        ("lr: 1\nvariant: a", "", "'variant'"),
        ("lr: 1", "--compile --lif-backend triton", "triton"),
        ("lr: 1\nlif_backend: cupy", "--compile", "cupy"),
        ("lr: 1", "--pack-spikes --lif-backend torch", "pack_spikes"),
        ("lr: 1", "--cutmix-minmax 0.5 0.5", "cutmix_minmax"),
        ("lr: 1", "--pack-spikes --neuron if", "pack_spikes"),
        ("lr: 1", "--pack-spikes --tau 1.5", "pack_spikes"),
        ("lr: 1", "--lif-backend cupy --amp bf16", "lif_backend"),
        ("lr: 1", "--compile --cuda-graphs", "cuda_graphs"),
        ("lr: 1", "--compile --energy", "energy"),
        ("lr: 1", "--cuda-graphs --lif-backend cupy", "cuda_graphs"),
        ("lr: 1", "--cuda-graphs --grad-checkpointing --drop-path 0.1", "drop_path"),
        ("lr: 1", "--config no/such.yml", "no/such.yml"),
        ("lr: 1", "--config /", "/"),
        ("lr: 1", f"--config {5000 * 'x'}", "x"),
    ],
)
def test_mistakes_are_reported(recipe, text, flags, value):
    with refuses(value):
        config.load(recipe(text), flags.split())


def test_suggestions_have_the_meaning_of_what_was_typed(recipe):
    for flag in ("--print-freq", "--momentum", "--test-only", "--vflip"):
        with refuses(flag) as error:
            config.load(recipe("lr: 1"), [flag, "1"])
        assert "did you mean" not in str(error.value)
    with refuses("--batch-size"):
        config.load(recipe("lr: 1"), ["--batchsize", "1"])


FOREIGN = {  # key sets of other projects' YAMLs: file -> settings, keys without effect
    "spikformer_cifar.yml": (
        {"time_steps": 4, "eval_batch_size": 128, "amp": "fp16", "drop_path": 0, "data_path": "/data/cifar"},
        {"layer", "dim", "patch_size", "num_heads", "drop_path", "experiment", "eval_metric"},
    ),
    "spikingformer_imagenet.yml": (
        {"model": "spikingformer_8_768", "time_steps": 4, "in_channels": 3, "workers": 16, "mixup_off_epoch": 0},
        {"depths", "num_heads", "patch_size", "drop_path", "sr_ratios", "log_wandb"},
    ),
    "events.yml": (
        {"time_steps": 16, "batch_size": 16, "workers": 8, "amp": "off", "data_path": "/data/dvs", "num_classes": 11},
        {"depths", "world_size", "dist_url"},
    ),
    "timm.yml": (
        {"amp": "off", "auto_augment": None, "accum_iter": 2, "drop_path": 0.1, "eval_batch_size": None},
        {"model_ema", "model_ema_decay", "pretrained", "img_size", "vflip", "opt_betas", "lr_noise", "worker_seeding"},
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_recipes_of_other_projects(name):
    settings, ignored = FOREIGN[name]
    sources = config.read(ROOT / "cifar10/cifar10.yml", ["--config", str(ROOT / "tests/recipes" / name)])
    cfg = sources.config()
    assert {key: getattr(cfg, key) for key in settings} == settings
    assert set(sources.ignored) == ignored


def test_sizes_and_amp_as_timm_writes_them(recipe):
    cfg = config.load(recipe("lr: 1\ninput_size: [1, 224, 224]\n"), ["--amp", "--eval-amp", "bf16"])
    assert (cfg.in_channels, cfg.input_size, cfg.amp, cfg.eval_amp) == (1, 224, "fp16", "bf16")
    with refuses("input_size"):
        config.load(recipe("lr: 1\ninput_size: [3, 224, 288]\n"))


def test_training_warns_of_other_settings_than_the_published_run_had(warnings):
    recipe = ROOT / "cifar10/cifar10.yml"
    for flags in ([], ["--variant", "spikformer_4_384"], ["--model", "qkformer_2_256", "--in-channels", "3"]):
        sources = config.read(recipe, flags)
        weights.warn_of_recipe(sources.config(), sources)
    assert not warnings
    sources = config.read(recipe, ["--config", str(ROOT / "tests/recipes/spikformer_cifar.yml")])
    weights.warn_of_recipe(sources.config(), sources)
    named(warnings[0], "ssa_membrane", "'per_sample'", "'released'", recipe)
    named(warnings[1], "mixup_off_epoch", "200", "None", recipe)


def test_the_first_lines_of_training(tmp_path, monkeypatch, capfd):
    foreign = yaml.safe_load((ROOT / "digits/digits.yml").read_text())
    del foreign["time_steps"], foreign["variants"]
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump(foreign | {"T": 1, "depths": 3, "mixup": 0.5, "epochs": 1}))
    flags = "--batch-size 240 --warmup-epochs 0 --patch-size 4 --mixup-off-epoch 0".split()
    flags += ["--config", tmp_path / "theirs.yml", "--output-dir", tmp_path / "run"]
    first, _, rest = here(monkeypatch, capfd, "digits/train.py", *flags).partition("writing to")
    named(first, "depths", "--patch-size", "per_sample", "1 epochs")
    assert "mixup" in first
    assert "depths" not in rest


def test_keys_without_effect_are_flags_without_effect(recipe):
    sources = config.read(recipe("lr: 1"), ["--depths", "4", "--local-rank=1", "--no-pin-mem", "--T", "2"])
    assert sources.ignored == ["--depths", "--no-pin-mem"]  # launchers pass the other
    assert sources.config().time_steps == 2


def test_every_field_has_its_help():
    assert all(field.metadata["help"] for field in config.FIELDS.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_loads(path):
    for cfg in config.read(path).all():
        assert optim.lr_at(cfg, 0) >= 0


def test_a_variant_changes_what_it_lists(recipe):
    path = recipe(
        "lr: 1e-3\nepochs: 7\nlog_top1: 50\nvariants:\n  short: {epochs: 2, paper_top1: 40}\n  other: {lr: 2}"
    )
    assert list(config.read(path).recipes) == [None, "short", "other"]
    cfg = config.load(path, ["--variant", "short"])
    assert (cfg.variant, cfg.lr, cfg.epochs, cfg.paper_top1, cfg.log_top1) == ("short", 1e-3, 2, 40, None)
    assert config.load(path, ["--variant", "short", "--epochs", "3"]).epochs == 3
    assert config.load(path).log_top1 == 50
    recorded = config.plain(cfg)
    assert config.load(path, [], recorded).epochs == 2
    assert config.load(path, ["--variant", "short"], recorded).variant == "short"


@pytest.mark.parametrize(
    ("script", "flags", "shown", "hidden"),
    [
        ("imagenet/train.py", [], ["[qkformer_10_384]", "[200]", "--lr ", "optimization:"], ["--energy", "--paper"]),
        ("imagenet/train.py", ["--config", "qkformer_10_768_384"], ["[384]", "[qkformer_10_768]"], ["[224]"]),
        ("imagenet/test.py", [], ["--checkpoint", "--energy"], ["--lr ", "--mixup", "--seed", "--resume", "--eval "]),
    ],
)
def test_help_has_the_values_of_the_recipe_and_what_the_script_reads(script, flags, shown, hidden, monkeypatch, capfd):
    with pytest.raises(SystemExit) as end:
        here(monkeypatch, capfd, script, *flags, "--help")
    out = capfd.readouterr().out
    assert not end.value.code
    named(out, f"python {script}", "model:", "data:", "run:", "machine:", *shown)
    assert not [text for text in hidden if text in out]
