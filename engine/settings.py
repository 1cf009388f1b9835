"""The settings of a run, each declared once with its type, default, help and range."""

import dataclasses
from collections.abc import Sequence


def option(default, help: str, *, choices=(), low=None, high=None, flags: Sequence[str] = ()):
    """A field of `Config`: allowed values or inclusive range, and further spellings of its flag."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "low": low, "high": high, "flags": flags}
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Sizes in pixels, rates per image, learning rates absolute unless said otherwise."""

    config: str = option(
        "", "recipe to read in place of the script's own: a file, or the name of one beside the script"
    )
    variant: str | None = option(None, "one of the recipe's variants, such as an ablation")
    effective_batch: int | None = option(
        None, "images per update that the recipe means; a run that has another number warns", low=1
    )
    paper_top1: float | None = option(None, "accuracy in the paper (%)", low=0, high=100)
    log_top1: float | None = option(None, "best accuracy in the published log (%)", low=0, high=100)
    paper_energy_mj: float | None = option(None, "energy of an inference in the paper (mJ)", low=0)

    model: str = option("qkformer_4_384", "network, see models.list_models()")
    num_classes: int = option(10, "classes of the data set", low=1, flags=("--nb-classes",))
    in_channels: int = option(3, "channels of the input", low=1)
    time_steps: int = option(
        4, "T: how often a static image is shown, or frames of a recording", low=1, high=1024, flags=("--time-step",)
    )
    attention: tuple[str, ...] | None = option(None, "token, channel or self for each stage (default: the model's)")
    mlp_ratio: float | None = option(
        None, "hidden over outer channels of the MLP (default: the model's)", low=0.1, high=64
    )
    shortcut: bool = option(True, "SPEDS with its shortcut")
    embed: str | None = option(
        None, "patch embedding of Spikformer: its own, or SPEDS (default: the model's)", choices=("sps", "speds")
    )
    ssa_scale: float | None = option(None, "factor of the product in the self-attention (default: 0.125)", low=1e-6)
    residual: str = option("sew", "what residual connections add: spikes or membrane currents", choices=("sew", "ms"))
    ssa_membrane: str = option(
        "per_sample",
        "membrane of the self-attention: per sample, or leaking over the batch as released (README, errata)",
        choices=("per_sample", "released"),
    )
    drop_path: float = option(0.0, "stochastic depth: rate of the last block, rising linearly to it", low=0, high=0.99)
    lif_backend: str = option(
        "auto",
        "what computes the LIF neurons; auto takes the fastest that runs here",
        choices=("auto", "torch", "cupy", "triton"),
    )

    dataset: str = option(
        "imagefolder",
        "digits, imagefolder, digits-dvs, dvs128-gesture, cifar10-dvs, or timm's torch/NAME, wds/NAME or hfds/NAME",
    )
    data_path: str | None = option(None, "folder of the data set; in a YAML relative to it", flags=("--data-dir",))
    download: bool = option(False, "download CIFAR, CIFAR10-DVS or another data set of torchvision")
    train_split: str = option("train", "training split of a data set of timm's")
    val_split: str = option("validation", "test split of a data set of timm's")
    split_seed: int | None = option(
        None, "CIFAR10-DVS: seed of a random split (default: the first 90 % of each class train)", low=0, high=2**32 - 1
    )
    input_size: int = option(32, "height and width of the input", low=1, high=8192, flags=("--img-size",))
    batch_size: int = option(64, "images per process and step", low=1, high=65536, flags=("-b",))
    eval_batch_size: int | None = option(None, "the same in the evaluation (default: batch_size)", low=1, high=65536)
    workers: int = option(
        4, "loader processes per training process, at most one a core", low=0, high=256, flags=("--num-workers", "-j")
    )
    mean: tuple[float, ...] | None = option(None, "mean of each channel of an image, of 1 (default: ImageNet's)")
    std: tuple[float, ...] | None = option(None, "standard deviation of each channel, of 1 (the same)", low=1e-6)
    interpolation: str = option("bicubic", "resizing filter", choices=("bicubic", "bilinear", "nearest"))
    scale: tuple[float, ...] = option((1.0, 1.0), "random resized crop: area, from and to", low=0.01, high=1)
    ratio: tuple[float, ...] = option((1.0, 1.0), "random resized crop: aspect ratio, from and to", low=0.01)
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    color_jitter: float | None = option(None, "strength of colour jitter, where there is no auto_augment", low=0)
    auto_augment: str | None = option(
        None, "timm's policy, such as rand-m9-mstd0.5-inc1; of event frames: snn-wide", flags=("--aa",)
    )
    reprob: float = option(0.0, "probability of random erasing", low=0, high=1)
    remode: str = option("const", "what random erasing fills in", choices=("const", "rand", "pixel"))
    recount: int = option(1, "most areas that random erasing erases", low=1)
    crop_pct: float | None = option(
        None,
        "evaluation: side of the centre crop over side of the resized image (default: 0.875 up to 224 pixels, else 1)",
        low=0.1,
        high=1,
    )
    mixup: float = option(0.0, "alpha of mixup; 0 is none", low=0)
    cutmix: float = option(0.0, "alpha of cutmix; 0 is none", low=0)
    cutmix_minmax: tuple[float, ...] | None = option(None, "cutmix: side of the area, from and to", low=0, high=1)
    mixup_prob: float = option(1.0, "probability that mixup or cutmix is applied", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", low=0, high=1)
    mixup_mode: str = option("batch", "one mixing ratio per batch, pair or image", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int | None = option(None, "first epoch without mixup (default: never off)", low=0)
    mixup_in: str = option("loader", "mix in the loader's workers or in the training step", choices=("loader", "step"))
    smoothing: float = option(0.1, "label smoothing", low=0, high=0.999)

    opt: str = option("adamw", "timm's optimizer")
    lr: float | None = option(None, "learning rate (default: blr * effective batch / 256)", low=0, high=1000)
    blr: float | None = option(None, "learning rate per 256 images of effective batch", low=0, high=1000)
    weight_decay: float = option(0.05, "weight decay", low=0)
    decay_1d: bool = option(False, "decay biases and BatchNorm too")
    layer_decay: float = option(1.0, "factor of the learning rate from each layer to the one before", low=1e-3, high=1)
    clip_grad: float | None = option(None, "largest norm of the gradient (default: not clipped)", low=1e-9)
    sched: str = option("cosine", "timm's learning-rate schedule", choices=("cosine", "poly", "tanh", "constant"))
    epochs: int = option(300, "epochs of the schedule", low=1)
    cooldown_epochs: int = option(0, "epochs at min_lr behind the schedule", low=0)
    warmup_epochs: int = option(0, "epochs of linear warm-up", low=0)
    warmup_lr: float = option(1e-5, "learning rate at the start of the warm-up", low=0)
    warmup_prefix: bool = option(False, "the decay starts behind the warm-up, not underneath it")
    min_lr: float = option(1e-5, "learning rate at the end of the schedule", low=0)
    lr_step: str = option("epoch", "how often the learning rate changes", choices=("epoch", "iteration"))
    accum_iter: int = option(1, "steps whose gradients are added up for one update", low=1)
    ema_decay: float | None = option(
        None, "also average the weights, with this decay per update; the average is evaluated", low=0, high=1
    )
    amp: str = option("off", "mixed precision of the training", choices=("fp16", "bf16", "off"))
    eval_amp: str | None = option(
        None, "mixed precision of the evaluation (default: that of the training)", choices=("fp16", "bf16", "off")
    )
    tf32: bool = option(False, "on a GPU compute float32 convolutions and matrix products in TF32: faster, less exact")
    cudnn_benchmark: bool = option(
        True, "let cuDNN time its algorithms and take the fastest; runs may differ in the last bits"
    )
    sync_bn: bool = option(False, "BatchNorm over the batches of all processes")
    channels_last: bool = option(False, "keep images in channels-last memory")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    pack_spikes: bool = option(
        False, "keep spikes for the backward pass packed: less memory, a little more time (lif_backend triton)"
    )
    compile: bool = option(False, "torch.compile the network (lif_backend auto or torch)")
    cuda_graphs: bool = option(False, "launch forward and backward pass as one CUDA graph, by one process on a GPU")

    seed: int = option(42, "seed of weights, order and augmentation", low=0, high=2**32 - 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads of torch per process (default: torch's choice)", low=1, high=1024)
    output_dir: str | None = option(None, "folder of the run (default: output/RECIPE/TIME, or that of --resume)")
    resume: str | None = option(None, "checkpoint to go on from; 'auto' is last.pt of --output-dir, if there")
    finetune: str | None = option(None, "checkpoint whose weights to start from; the head is new if classes differ")
    checkpoint: str | None = option(None, "test.py: checkpoint to evaluate (default: best.pt of the recipe's last run)")
    eval: bool = option(False, "train.py: only evaluate the checkpoint of --resume or --finetune, as test.py does")
    both_membranes: bool = option(False, "test.py: evaluate with either kind of ssa_membrane")
    energy: bool = option(False, "test.py: also measure MACs, synaptic operations, firing rates and energy")
    use_ema: bool = option(True, "test.py and finetune: take the averaged weights where the checkpoint has them")
    save_steps: int | None = option(
        None, "updates within an epoch from one saving to the next (default: save after each epoch)", low=1
    )
    keep: int = option(1, "checkpoints before last.pt that are kept, as last-1.pt and so on", low=0, high=1000)
    log_interval: int = option(50, "steps between two lines of progress where there is no terminal", low=1)
