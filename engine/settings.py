"""Settings of a run, each declared once, and their conflicts. Checkpoints record all but `MachineSettings`."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields

AMP = ("fp16", "bf16", "off")
HELP = {  # script -> a sentence, and the flags of examples; {} is the recipe
    "train": ["Train a network.", "--output-dir output/my-{}", "--output-dir output/my-{} --resume auto"],
    "test": ["Evaluate a checkpoint.", "--checkpoint output/my-{}/best.pt", "--energy"],
}
NOT_COMPILED = ("pack_spikes", "energy", "cuda_graphs")
TRAINING = ("augmentation", "optimization")  # groups of settings that test.py does not read


def option(default, help: str, **rules):
    """Declare a field: `choices`, or inclusive bounds `low` and `high`; `flags` are other names, in YAML too.

    `only` is the script that reads the field, if the other does not. `group` opens a group of `--help`.
    """
    no_rules = {"choices": (), "low": None, "high": None, "flags": (), "only": None, "group": None}
    return field(default=default, metadata=no_rules | {"help": help} | rules)


@dataclass(frozen=True)
class Published:
    """Published figures."""

    paper_top1: float | None = option(None, "accuracy in the paper (%)", low=0, high=100)
    paper_top5: float | None = option(None, "top-5 accuracy in the paper (%)", low=0, high=100)
    paper_unverified: bool = option(False, "paper_top1 was read from a copy of the paper, and is to be verified")
    log_top1: float | None = option(None, "best accuracy in the published log (%)", low=0, high=100)
    log_hours: float | None = option(None, "hours of training in the published log", low=0)
    log_memory_gb: float | None = option(None, "memory of each GPU in the published log (GB)", low=0)
    paper_energy_mj: float | None = option(None, "energy per inference in the paper (mJ)", low=0)


@dataclass(frozen=True)
class ModelSettings:
    """Arguments of the network; None is the model's default."""

    model: str = option("qkformer_4_384", "network; docs/backbone.md lists all", group="model")
    num_classes: int | None = option(10, "classes; none: count the folders", low=1, flags=["--nb-classes"])
    in_channels: int = option(3, "channels of the input", low=1, flags=["--in-chans"])
    time_steps: int = option(4, "T: steps per image or recording", low=1, high=1024, flags=["--time-step", "--T", "-T"])
    attention: tuple[str, ...] | None = option(None, "token, channel or self, of each stage (default: the model's)")
    mlp_ratio: float | None = option(None, "MLP: hidden over outer channels (default: the model's)", low=0.1, high=64)
    heads: int | None = option(None, "attention heads (default: the model's)", low=1)
    neuron: str = option("lif", "neurons: lif, if (no decay), plif (learned decay)", choices=("lif", "if", "plif"))
    tau: float | None = option(None, "membrane time constant (default: the model's)", low=1)
    shortcut: bool = option(True, "SPEDS with its shortcut")
    embed: str | None = option(None, "speds: SPEDS in Spikformer (default: its own)", choices=("speds",))
    ssa_scale: float | None = option(None, "factor in the self-attention (default: 0.125)", low=1e-6)
    residual: str = option("sew", "residuals add spikes (sew) or membrane currents (ms)", choices=("sew", "ms"))
    ssa_membrane: str = option(
        "per_sample", "released: the self-attention's membrane leaks over the batch", choices=("per_sample", "released")
    )


@dataclass(frozen=True)
class DataSettings:
    """Data set and augmentation."""

    dataset: str = option("imagefolder", "imagefolder, eventfolder, digits, or timm's create_dataset's", group="data")
    split_seed: int | None = option(None, "cifar10-dvs, eventfolder: seed of a random split", low=0, high=2**32 - 1)
    sensor_size: tuple[int, ...] | None = option(None, "eventfolder: height, width of the sensor (input_size)", low=1)
    input_size: int = option(32, "height and width of the input", low=1, high=8192, flags=["--img-size"])
    batch_size: int = option(64, "images per rank and step", low=1, high=65536, flags=["-b"])
    eval_batch_size: int | None = option(
        None, "batch_size of evaluations", low=1, high=65536, flags=["--val-batch-size", "--validation-batch-size"]
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1, group="augmentation")
    auto_augment: str | None = option(None, "timm's policy, as rand-m9-mstd0.5-inc1; events: snn-wide", flags=["--aa"])
    mixup: float = option(0.0, "alpha of mixup; 0: off", low=0)
    mixup_prob: float = option(1.0, "probability of mixup or cutmix", low=0, high=1)
    mixup_mode: str = option("batch", "one mixing ratio per batch, pair or image", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int | None = option(None, "first epoch without mixup (default, 0: never off)", low=0)
    mixup_in: str = option("loader", "mix in the loader's workers or in the step", choices=("loader", "step"))
    smoothing: float = option(0.1, "label smoothing", low=0, high=0.999)


@dataclass(frozen=True)
class ImageSettings:
    """Data settings of images; event frames need the defaults."""

    scale: tuple[float, ...] = option((1.0, 1.0), "random resized crop: least and most area", low=0.01, high=1)
    ratio: tuple[float, ...] = option((1.0, 1.0), "random resized crop: least and most aspect ratio", low=0.01)
    color_jitter: float | None = option(None, "strength of colour jitter, without auto_augment", low=0)
    reprob: float = option(0.0, "probability of random erasing", low=0, high=1)
    remode: str = option("const", "fill of random erasing", choices=("const", "rand", "pixel"))
    recount: int = option(1, "most areas of random erasing", low=1)
    cutmix: float = option(0.0, "alpha of cutmix; 0: off", low=0)
    cutmix_minmax: tuple[float, ...] | None = option(None, "cutmix: least and most side of the area", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", low=0, high=1)
    train_split: str = option("train", "training split of a data set of timm's", only="train", group="data")
    val_split: str = option("validation", "test split of a data set of timm's")
    mean: tuple[float, ...] | None = option(None, "mean of each channel (default: ImageNet's)")
    std: tuple[float, ...] | None = option(None, "standard deviation of each channel (default: ImageNet's)", low=1e-6)
    interpolation: str = option(
        "bicubic", "resizing filter", choices=("bicubic", "bilinear", "nearest"), flags=["--train-interpolation"]
    )
    crop_pct: float | None = option(None, "test: crop over resized side (0.875; above 224: 1)", low=0.1, high=1)


@dataclass(frozen=True)
class OptimSettings:
    """Training: optimizer, schedule, precision, checkpoints."""

    effective_batch: int | None = option(None, "images per update; warns if it differs", low=1, group="optimization")
    opt: str = option("adamw", "timm's optimizer")
    lr: float | None = option(None, "learning rate (default: blr * effective batch / 256)", low=0, high=1000)
    blr: float | None = option(None, "learning rate per 256 images of effective batch", low=0, high=1000)
    weight_decay: float = option(0.05, "weight decay", low=0)
    decay_1d: bool = option(False, "decay biases and BatchNorm too")
    layer_decay: float = option(1.0, "factor of the learning rate from layer to layer, downwards", low=1e-3, high=1)
    clip_grad: float | None = option(None, "largest norm of the gradient (default: no limit)", low=1e-9)
    sched: str = option("cosine", "timm's schedule", choices=("cosine", "poly", "tanh", "constant"))
    epochs: int = option(300, "epochs of the schedule", low=1)
    cooldown_epochs: int = option(0, "epochs at min_lr after the schedule", low=0)
    warmup_epochs: int = option(0, "epochs of linear warm-up", low=0)
    warmup_lr: float = option(1e-5, "learning rate at the start of the warm-up", low=0)
    warmup_prefix: bool = option(False, "start the decay after the warm-up, not with it")
    min_lr: float = option(1e-5, "learning rate at the end of the schedule", low=0)
    lr_step: str = option("epoch", "interval of learning-rate changes", choices=("epoch", "iteration"))
    accum_iter: int = option(1, "steps whose gradients add up to one update", low=1, flags=["--grad-accum-steps"])
    ema_decay: float | None = option(None, "decay of averaged weights, to be evaluated (default: none)", low=0, high=1)
    drop_path: float = option(0.0, "stochastic depth: rate of the last block, linear from 0", low=0, high=0.99)
    variant: str | None = option(None, "variant of the recipe, such as an ablation", group="run")
    seed: int = option(42, "seed of weights, order and augmentation", low=0, high=2**32 - 1, only="train")
    save_steps: int | None = option(None, "also save after every N updates (default: no)", low=1, only="train")
    keep: int = option(1, "older last.pt to keep, as last-1.pt and so on", low=0, high=1000, only="train")
    amp: str = option("off", "mixed precision; without a value fp16", choices=AMP, group="machine")
    eval_amp: str | None = option(None, "mixed precision of evaluations (default: amp)", choices=AMP)
    sync_bn: bool = option(False, "BatchNorm over the batches of all ranks", only="train")
    channels_last: bool = option(False, "keep weights and activations in channels-last memory")
    grad_checkpointing: bool = option(False, "recompute activations: less memory, more time", only="train")


@dataclass(frozen=True)
class MachineSettings:
    """Settings of a computer or a command, not of a run."""

    data_path: str | None = option(None, "folder; in a YAML relative to it", flags=["--data-dir"], group="data")
    download: bool = option(False, "download the data set where its library can", flags=["--dataset-download"])
    workers: int = option(4, "loader workers", low=0, high=256, flags=["--num-workers", "-j"], group="machine")
    device: str = option("auto", "device to compute on", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads of torch per rank (default: torch's)", low=1, high=1024)
    lif_backend: str = option("auto", "implementation of the neurons", choices=("auto", "torch", "cupy", "triton"))
    tf32: bool = option(False, "float32 convolutions and matrix products in TF32: faster, less exact")
    cudnn_benchmark: bool = option(True, "let cuDNN choose its fastest algorithms; the last bits may differ")
    pack_spikes: bool = option(False, "keep spikes packed: less memory, more time", only="train")
    compile: bool = option(False, "torch.compile the network (lif_backend auto or torch)")
    cuda_graphs: bool = option(False, "launch a step as one CUDA graph (one rank)", only="train")
    config: str = option("", "recipe: a file, or a name in the folder of the default recipe", flags=["-c"], group="run")
    output_dir: str | None = option(None, "folder to write to (default: output/RECIPE/TIME, or the checkpoint's)")
    resume: str | None = option(None, "checkpoint to resume; auto: last.pt of --output-dir, if any", only="train")
    finetune: str | None = option(None, "checkpoint to start from; new classes get a new head", only="train")
    checkpoint: str | None = option(None, "checkpoint to evaluate (default: best.pt of the last run)", only="test")
    eval: bool = option(False, "evaluate --resume or --finetune as test.py does", only="train")
    energy: bool = option(False, "also measure MACs, synaptic operations, firing rates and energy", only="test")
    use_ema: bool = option(True, "load the averaged weights of a file, if it has any")
    log_interval: int = option(50, "steps from one line of progress to the next, in logs", low=1)


@dataclass(frozen=True)
class Config(MachineSettings, OptimSettings, ImageSettings, DataSettings, ModelSettings, Published):
    """All settings of a run. Sizes in pixels, rates per image, learning rates absolute unless said otherwise."""


FIELDS = {item.name: item for item in fields(Config)}


def names(group: type) -> list[str]:
    """Return the settings of a class."""
    return [item.name for item in fields(group)]


def plain(config: Config, without: Collection[str] = ()) -> dict[str, object]:
    """Return the settings as plain data for YAML, JSON and checkpoints."""
    values = {key: value for key, value in vars(config).items() if key not in without}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def groups(script: str) -> dict[str, list[str]]:
    """Return the settings that the script "train" or "test" reads, by group of `--help`."""
    groups, title = {}, None
    for key, rules in ((key, FIELDS[key].metadata) for key in FIELDS):
        title = rules["group"] or title
        if title and rules["only"] in (None, script) and (script == "train" or title not in TRAINING):
            groups.setdefault(title, []).append(key)
    return groups


def out_of_range(config: Config) -> Iterator[tuple[str, str]]:
    """Yield each setting with a value that its field does not allow, and the fix."""
    for key, item in FIELDS.items():
        value, rules = getattr(config, key), item.metadata
        low, high = rules["low"], rules["high"]
        for number in value if isinstance(value, tuple) else (value,) if value is not None else ():
            if rules["choices"] and number not in rules["choices"]:
                yield key, f"choose one of {', '.join(rules['choices'])}"
            if isinstance(number, float) and not math.isfinite(number):
                yield key, "must be finite"
            if (low is not None and number < low) or (high is not None and number > high):
                yield key, f"must be at least {low}" + (f" and at most {high}" if high is not None else "")


def mixes(c: Config) -> bool:
    """Return True if mixup or cutmix mixes the images of a batch."""
    return bool(c.mixup or c.cutmix or c.cutmix_minmax)


def conflicts(c: Config) -> Iterator[tuple[str, str]]:
    """Yield each setting that does not go together with others, and the fix."""
    for key in ("scale", "ratio", "cutmix_minmax"):
        bounds = getattr(c, key)
        if bounds is not None and (len(bounds) != 2 or bounds[0] > bounds[1]):
            yield key, "needs two numbers, the smaller first"
    sizes = [c.input_size * share // 1 for share in c.cutmix_minmax or (0, 1)]  # of the area, in whole pixels
    rules = (
        (len({*sizes}) < 2, "cutmix_minmax", "needs two different numbers of pixels of input_size"),
        (c.lr is None and c.blr is None, "lr", "set lr, or blr to scale with the batch"),
        (c.warmup_prefix and c.warmup_epochs >= c.epochs, "warmup_epochs", "must be below epochs"),
        (mixes(c) and c.batch_size % 2, "batch_size", "must be even, because mixup pairs the images of a batch"),
        (c.compile and c.lif_backend not in ("auto", "torch"), "lif_backend", "use auto or torch with compile"),
        (c.pack_spikes and c.lif_backend not in ("auto", "triton"), "pack_spikes", "needs lif_backend auto or triton"),
        (c.pack_spikes and c.residual == "ms", "pack_spikes", "needs residual sew"),
        (c.pack_spikes and (c.neuron, c.tau or 2) != ("lif", 2), "pack_spikes", "needs LIF neurons with tau 2"),
        ("bf16" in (c.amp, c.eval_amp) and c.lif_backend == "cupy", "lif_backend", "use auto or triton with bf16"),
        (c.finetune and c.resume not in (None, "auto"), "finetune", "starts a run; use it without resume"),
        *((c.compile and getattr(c, key), key, "use it without compile") for key in NOT_COMPILED),
        (c.cuda_graphs and c.lif_backend == "cupy", "lif_backend", "use auto or triton with cuda_graphs"),
        (c.cuda_graphs and c.grad_checkpointing and c.drop_path, "drop_path", "must be 0: a graph draws it once"),
    )
    yield from ((key, fix) for is_wrong, key, fix in rules if is_wrong)
