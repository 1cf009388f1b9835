"""Spikes and energy of one sample in each stage of a network, for each time step (spikes.png).

    python -m analysis.spikes --checkpoint output/first/best.pt [--sample N]

A row is a time step. The columns are the input, and the first and last neuron layer of each stage: the share of
channels that spike at each position. The bar shows the energy of each part of the network.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.cli import UserError
from engine.data.recordings import EVENT_DATASETS
from engine.log import logger
from models import LIF

from .common import Subject, drawing, hooked, main, subjects
from .energy import estimate

PARTS = {"embed": "embedding", "attn": "attention", "mlp": "MLP"}  # of a stage: name of the module -> label
COLOURS = {"embedding": "skyblue", "attention": "orange", "MLP": "yellowgreen"}


def measure(subject: Subject, sample: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return the share of spiking channels [T,H,W] in the first and last neurons of each stage, and the class."""
    stages = {}
    for name, module in subject.model.named_modules():
        if isinstance(module, LIF) and name.startswith("stages."):
            stages.setdefault(name.split(".")[1], []).append((name, module))
    chosen = {lif: name for layers in stages.values() for name, lif in (layers[0], layers[-1])}
    spikes = {}
    callbacks = {lif: lambda _, x, name=name: spikes.update({name: x[:, 0].mean(1)}) for lif, name in chosen.items()}
    with hooked(callbacks), torch.inference_mode():
        answer = subject.model(sample).argmax().item()
    return spikes, answer


def energies(subject: Subject, sample: Tensor) -> dict[str, float]:
    """Return the energy (µJ) of each part of each stage, in the order of execution."""
    parts = {}
    for row in estimate(subject.model, sample).rows():
        words = row["layer"].replace(".", " ").split()  # as in "stages.2.blocks.0.attn product 1"
        part = next((PARTS[word] for word in words if word in PARTS), row["layer"])
        name = f"{part} {int(words[1]) + 1}" if words[0] == "stages" else part
        parts[name] = parts.get(name, 0.0) + 1000 * row["energy (mJ)"]
    return parts


def draw(frames: Sequence[Tensor], spikes: dict[str, Tensor], parts: dict[str, float], title: str, path: Path) -> None:
    """Draw frames [H,W,C] and spikes [T,H,W] in a row for each time step, and a bar of the energies."""
    rows, columns = len(frames), len(spikes) + 1
    size = (max(6, 1.05 * columns), 1.1 * rows + 1.4)
    with drawing(path, rows + 1, columns, size, height_ratios=[1] * rows + [0.3]) as (figure, axes):
        for t, frame in enumerate(frames):
            axes[t * columns].imshow(frame.numpy(), cmap="gray", vmin=0, vmax=1)
            axes[t * columns].set_ylabel(f"t = {t}")
            for axis, layer in zip(axes[t * columns + 1 :], spikes.values(), strict=False):
                axis.imshow(layer[t].numpy(), cmap="inferno", vmin=0, vmax=layer.max().item() or 1)
                axis.set_xlabel(f"{layer[t].mean():.3f}", fontsize=8)
        axes[0].set_title("input", fontsize=9)
        for axis, (name, layer) in zip(axes[1:], spikes.items(), strict=False):
            words, (height, width) = name.split("."), layer.shape[1:]
            part = next(PARTS[word] for word in words if word in PARTS)
            axis.set_title(f"stage {int(words[1]) + 1}\n{part}, {height}x{width}", fontsize=9)
        for axis in axes[: rows * columns]:
            axis.set(xticks=[], yticks=[])
        for axis in axes[rows * columns :]:
            axis.remove()
        bar, total = figure.add_subplot(axes[0].get_gridspec()[-1, :]), sum(parts.values())
        for (name, energy), end in zip(parts.items(), itertools.accumulate(parts.values()), strict=True):
            part, *stage = name.split()
            new = part in COLOURS and part not in bar.get_legend_handles_labels()[1]
            colour = COLOURS.get(part, "grey")
            bar.barh(0, energy, left=end - energy, color=colour, edgecolor="white", label=part if new else None)
            if energy > 0.03 * total:
                bar.text(end - energy / 2, 0, *stage, ha="center", va="center", fontsize=8)
        bar.set(yticks=[], xlim=(0, total), xlabel=f"energy by part and stage, {total:.3g} µJ in total")
        figure.legend(loc="outside lower center", ncols=len(COLOURS), fontsize=8)
        figure.suptitle(title, fontsize=10)


def run(argv: Sequence[str]) -> None:
    args, (subject, *others) = subjects(__doc__, argv, sample={"type": int, "default": 0, "help": "test sample (0)"})
    images, labels = subject.samples(args.sample + 1)
    if others or not 0 <= args.sample < len(images):
        raise UserError(f"--sample {args.sample}: not a sample of one checkpoint; use 0 to {len(images) - 1}")
    sample = images[args.sample :]
    spikes, answer = measure(subject, sample)
    is_events = subject.cfg.dataset in EVENT_DATASETS  # a frame for each time step
    frames = sample[0].split(1) if is_events else sample.expand(subject.cfg.time_steps, -1, -1, -1)
    frames = [subject.data.show(frame.float().cpu()) for frame in frames]
    parts = energies(subject, sample)
    names = [subject.data.classes[i] for i in (labels[args.sample], answer)]
    title = f"Share of spiking channels (mean below), scaled by column; {names[0]}, classified as {names[1]}"
    draw(frames, {name: layer.cpu() for name, layer in spikes.items()}, parts, title, args.output_dir / "spikes.png")
    logger.info(", ".join(f"{name} {energy:.3g} µJ" for name, energy in parts.items()))
    logger.info(f"written: {args.output_dir / 'spikes.png'}")


if __name__ == "__main__":
    main(run)
