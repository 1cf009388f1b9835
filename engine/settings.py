"""Settings of a run: each declared once, with type, default, range, help and group, and the checks between them.

Groups: recipe, published (figures of others), model, data, image (data of images only), optim, and machine, for what
belongs to a computer or a command. A checkpoint records all groups but machine.
"""

import dataclasses
from collections.abc import Iterator, Sequence

EVENT_DATASETS = ("digits-dvs", "dvs128-gesture", "cifar10-dvs")


def option(group: str, default, help: str, *, choices=(), low=None, high=None, flags: Sequence[str] = ()):
    """Declare a field of `Config`: allowed values or inclusive range, and further spellings of its flag."""
    metadata = {"group": group, "help": help, "choices": choices, "low": low, "high": high, "flags": flags}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Sizes in pixels, rates per image, learning rates absolute unless said otherwise."""

    config: str = option("machine", "", "recipe in place of the script's own: a file, or its name next to the script")
    variant: str | None = option("recipe", None, "variant of the recipe, such as an ablation")
    effective_batch: int | None = option("recipe", None, "images per update; a run with another number warns", low=1)
    paper_top1: float | None = option("published", None, "accuracy in the paper (%)", low=0, high=100)
    log_top1: float | None = option("published", None, "best accuracy in the published log (%)", low=0, high=100)
    paper_energy_mj: float | None = option("published", None, "energy per inference in the paper (mJ)", low=0)

    model: str = option("model", "qkformer_4_384", "network, see models.list_models()")
    num_classes: int = option("model", 10, "classes of the data set", low=1, flags=("--nb-classes",))
    in_channels: int = option("model", 3, "channels of the input", low=1)
    time_steps: int = option(
        "model", 4, "T: time steps per image, or frames per recording", low=1, high=1024, flags=("--time-step",)
    )
    attention: tuple[str, ...] | None = option(
        "model", None, "token, channel or self for each stage (default: the model's)"
    )
    mlp_ratio: float | None = option(
        "model", None, "hidden over outer channels of the MLP (default: the model's)", low=0.1, high=64
    )
    shortcut: bool = option("model", True, "SPEDS with its shortcut")
    embed: str | None = option(
        "model", None, "patch embedding of Spikformer (default: the model's)", choices=("sps", "speds")
    )
    ssa_scale: float | None = option("model", None, "factor in the self-attention (default: 0.125)", low=1e-6)
    residual: str = option(
        "model", "sew", "residuals add spikes (sew) or membrane currents (ms)", choices=("sew", "ms")
    )
    ssa_membrane: str = option(
        "model",
        "per_sample",
        "membrane of the self-attention: per sample, or leaking over the batch as released (README, errata)",
        choices=("per_sample", "released"),
    )
    drop_path: float = option(
        "optim", 0.0, "stochastic depth: rate of the last block, rising linearly from 0", low=0, high=0.99
    )
    lif_backend: str = option(
        "machine",
        "auto",
        "implementation of the LIF neurons; auto: the fastest that runs",
        choices=("auto", "torch", "cupy", "triton"),
    )

    dataset: str = option(
        "data",
        "imagefolder",
        "digits, imagefolder, digits-dvs, dvs128-gesture, cifar10-dvs, or timm's torch/NAME, wds/NAME or hfds/NAME",
    )
    data_path: str | None = option(
        "machine", None, "folder of the data set; in a YAML relative to it", flags=("--data-dir",)
    )
    download: bool = option("machine", False, "download CIFAR, CIFAR10-DVS or another data set of torchvision")
    train_split: str = option("image", "train", "training split of a data set of timm's")
    val_split: str = option("image", "validation", "test split of a data set of timm's")
    split_seed: int | None = option(
        "data",
        None,
        "CIFAR10-DVS: seed of a random split (default: the first 90 % of each class train)",
        low=0,
        high=2**32 - 1,
    )
    input_size: int = option("data", 32, "height and width of the input", low=1, high=8192, flags=("--img-size",))
    batch_size: int = option("data", 64, "images per rank and step", low=1, high=65536, flags=("-b",))
    eval_batch_size: int | None = option(
        "data", None, "images per rank and step of an evaluation (default: batch_size)", low=1, high=65536
    )
    workers: int = option(
        "machine", 4, "loader workers per rank, at most one per core", low=0, high=256, flags=("--num-workers", "-j")
    )
    mean: tuple[float, ...] | None = option("image", None, "mean of each channel (default: ImageNet's)")
    std: tuple[float, ...] | None = option("image", None, "standard deviation of each channel (same)", low=1e-6)
    interpolation: str = option("image", "bicubic", "resizing filter", choices=("bicubic", "bilinear", "nearest"))
    scale: tuple[float, ...] = option(
        "image", (1.0, 1.0), "random resized crop: smallest and largest area", low=0.01, high=1
    )
    ratio: tuple[float, ...] = option(
        "image", (1.0, 1.0), "random resized crop: smallest and largest aspect ratio", low=0.01
    )
    hflip: float = option("data", 0.5, "probability of a horizontal flip", low=0, high=1)
    color_jitter: float | None = option("image", None, "strength of colour jitter, without auto_augment", low=0)
    auto_augment: str | None = option(
        "data", None, "timm's policy, such as rand-m9-mstd0.5-inc1; for event frames: snn-wide", flags=("--aa",)
    )
    reprob: float = option("image", 0.0, "probability of random erasing", low=0, high=1)
    remode: str = option("image", "const", "fill of random erasing", choices=("const", "rand", "pixel"))
    recount: int = option("image", 1, "most areas of random erasing", low=1)
    crop_pct: float | None = option(
        "image",
        None,
        "evaluation: side of the centre crop over side of the resized image (default: 0.875 up to 224 pixels, else 1)",
        low=0.1,
        high=1,
    )
    mixup: float = option("data", 0.0, "alpha of mixup; 0: off", low=0)
    cutmix: float = option("image", 0.0, "alpha of cutmix; 0: off", low=0)
    cutmix_minmax: tuple[float, ...] | None = option(
        "image", None, "cutmix: smallest and largest side of the area", low=0, high=1
    )
    mixup_prob: float = option("data", 1.0, "probability of mixup or cutmix", low=0, high=1)
    mixup_switch_prob: float = option("image", 0.5, "probability of cutmix where both are on", low=0, high=1)
    mixup_mode: str = option(
        "data", "batch", "one mixing ratio per batch, pair or image", choices=("batch", "pair", "elem")
    )
    mixup_off_epoch: int | None = option("data", None, "first epoch without mixup (default: never off)", low=0)
    mixup_in: str = option(
        "data", "loader", "mix in the loader's workers or in the training step", choices=("loader", "step")
    )
    smoothing: float = option("data", 0.1, "label smoothing", low=0, high=0.999)

    opt: str = option("optim", "adamw", "timm's optimizer")
    lr: float | None = option("optim", None, "learning rate (default: blr * effective batch / 256)", low=0, high=1000)
    blr: float | None = option("optim", None, "learning rate per 256 images of effective batch", low=0, high=1000)
    weight_decay: float = option("optim", 0.05, "weight decay", low=0)
    decay_1d: bool = option("optim", False, "decay biases and BatchNorm too")
    layer_decay: float = option(
        "optim", 1.0, "factor of the learning rate from each layer to the one before", low=1e-3, high=1
    )
    clip_grad: float | None = option("optim", None, "largest norm of the gradient (default: no limit)", low=1e-9)
    sched: str = option(
        "optim", "cosine", "timm's learning-rate schedule", choices=("cosine", "poly", "tanh", "constant")
    )
    epochs: int = option("optim", 300, "epochs of the schedule", low=1)
    cooldown_epochs: int = option("optim", 0, "epochs at min_lr after the schedule", low=0)
    warmup_epochs: int = option("optim", 0, "epochs of linear warm-up", low=0)
    warmup_lr: float = option("optim", 1e-5, "learning rate at the start of the warm-up", low=0)
    warmup_prefix: bool = option("optim", False, "start the decay after the warm-up, not with it")
    min_lr: float = option("optim", 1e-5, "learning rate at the end of the schedule", low=0)
    lr_step: str = option("optim", "epoch", "interval of learning-rate changes", choices=("epoch", "iteration"))
    accum_iter: int = option("optim", 1, "steps whose gradients are added up for one update", low=1)
    ema_decay: float | None = option(
        "optim", None, "also average the weights, with this decay per update, and evaluate the average", low=0, high=1
    )
    amp: str = option("optim", "off", "mixed precision of the training", choices=("fp16", "bf16", "off"))
    eval_amp: str | None = option(
        "optim", None, "mixed precision of evaluations (default: amp)", choices=("fp16", "bf16", "off")
    )
    tf32: bool = option("machine", False, "float32 convolutions and matrix products in TF32: faster, less exact")
    cudnn_benchmark: bool = option(
        "machine", True, "let cuDNN choose its fastest algorithms; runs may differ in the last bits"
    )
    sync_bn: bool = option("optim", False, "BatchNorm over the batches of all ranks")
    channels_last: bool = option("optim", False, "keep images in channels-last memory")
    grad_checkpointing: bool = option(
        "optim", False, "recompute activations in the backward pass: less memory, more time"
    )
    pack_spikes: bool = option(
        "machine", False, "pack the spikes kept for the backward pass: less memory, more time (lif_backend triton)"
    )
    compile: bool = option("machine", False, "torch.compile the network (lif_backend auto or torch)")
    cuda_graphs: bool = option("machine", False, "launch forward and backward pass as one CUDA graph (one rank)")

    seed: int = option("optim", 42, "seed of weights, order and augmentation", low=0, high=2**32 - 1)
    device: str = option("machine", "auto", "device to compute on", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(
        "machine", None, "CPU threads of torch per rank (default: torch's choice)", low=1, high=1024
    )
    output_dir: str | None = option(
        "machine", None, "folder of the run (default: output/RECIPE/TIME, or that of --resume)"
    )
    resume: str | None = option("machine", None, "checkpoint to resume; 'auto': last.pt of --output-dir, if any")
    finetune: str | None = option("machine", None, "checkpoint to start from; its head is replaced if classes differ")
    checkpoint: str | None = option(
        "machine", None, "test.py: checkpoint to evaluate (default: best.pt of the recipe's last run)"
    )
    eval: bool = option("machine", False, "train.py: evaluate the checkpoint of --resume or --finetune as test.py does")
    both_membranes: bool = option("machine", False, "test.py: evaluate with either kind of ssa_membrane")
    energy: bool = option("machine", False, "test.py: also measure MACs, synaptic operations, firing rates and energy")
    use_ema: bool = option("machine", True, "test.py and --finetune: prefer the averaged weights of a checkpoint")
    save_steps: int | None = option(
        "optim", None, "also save after this many updates within an epoch (default: after each epoch)", low=1
    )
    keep: int = option("optim", 1, "number of older last.pt to keep, as last-1.pt and so on", low=0, high=1000)
    log_interval: int = option("machine", 50, "steps between lines of progress without a terminal", low=1)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def group(*names: str) -> list[str]:
    """Return the fields of some groups, in order."""
    return [key for key, field in FIELDS.items() if field.metadata["group"] in names]


def conflicts(c: Config) -> Iterator[tuple[str, str]]:
    """Yield each setting that does not go together with others, and the fix."""
    for key in ("scale", "ratio", "cutmix_minmax"):
        bounds = getattr(c, key)
        if bounds is not None and (len(bounds) != 2 or bounds[0] > bounds[1]):
            yield key, "needs two numbers, the smaller first"
    is_events = c.dataset in EVENT_DATASETS
    for key in group("image") if is_events else ():
        if getattr(c, key) != FIELDS[key].default:
            yield key, f"is for images; {c.dataset} has event frames"
    for key in () if is_events else ("mean", "std"):
        if len(getattr(c, key) or (0, 0, 0)) != c.in_channels:  # ImageNet's have 3
            yield key, "needs one number for each of in_channels"
    mixes = c.mixup or c.cutmix or c.cutmix_minmax
    kernels = c.lif_backend in ("auto", "triton")
    rules = (
        (
            is_events and c.auto_augment not in (None, "snn-wide"),
            "auto_augment",
            "use snn-wide or none for event frames",
        ),
        (is_events and c.mixup and c.mixup_in != "step", "mixup_in", "set it to step for event frames"),
        (c.split_seed is not None and c.dataset != "cifar10-dvs", "split_seed", "only cifar10-dvs is split here"),
        (c.lr is None and c.blr is None, "lr", "set lr, or blr to scale with the batch"),
        (c.warmup_prefix and c.warmup_epochs >= c.epochs, "warmup_epochs", "must be below epochs"),
        (mixes and c.batch_size % 2, "batch_size", "must be even, because mixup pairs the images of a batch"),
        (c.compile and c.lif_backend not in ("auto", "torch"), "lif_backend", "use auto or torch with compile"),
        (
            c.pack_spikes and (c.compile or not kernels),
            "pack_spikes",
            "needs lif_backend auto or triton, and no compile",
        ),
        (c.pack_spikes and c.residual == "ms", "pack_spikes", "needs residual sew"),
        (c.cuda_graphs and c.compile, "cuda_graphs", "use it without compile"),
        (c.cuda_graphs and c.lif_backend == "cupy", "lif_backend", "use auto or triton with cuda_graphs"),
        (
            c.cuda_graphs and c.grad_checkpointing and c.drop_path,
            "drop_path",
            "use 0 with cuda_graphs and grad_checkpointing, which cannot draw it twice",
        ),
    )
    yield from ((key, fix) for is_wrong, key, fix in rules if is_wrong)
