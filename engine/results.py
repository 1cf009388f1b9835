"""What an evaluation found: told, and written beside the checkpoint."""

import json
from pathlib import Path

from . import log
from .config import Config, plain
from .log import logger
from .pictures import Gallery


def membranes(cfg: Config) -> list[str]:
    """The membranes to evaluate with, the configured one first."""
    if cfg.both_membranes and cfg.residual == "sew":
        return sorted(("released", "per_sample"), key=lambda kind: kind != cfg.ssa_membrane)
    if cfg.both_membranes:
        logger.warning("with membrane shortcuts nothing leaks over the batch: there is one membrane to evaluate")
    return [cfg.ssa_membrane]


def tell(cfg: Config, membrane: str, result: dict, figures: dict[str, float]) -> None:
    """Print the accuracy with one kind of membrane, beside what was published."""
    which = f" (ssa_membrane {membrane})" if cfg.both_membranes else ""
    logger.info(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} "
        f"on {result['count']} samples{which}"
    )
    if figures:
        told = ", ".join(
            f"{value:.2f} % ({source}; {result['top1'] - value:+.2f})" for source, value in figures.items()
        )
        logger.info(f"published: {told}")


def write(
    cfg: Config, folder: Path, results: dict[str, dict], figures: dict[str, float], gallery: Gallery, energy
) -> None:
    """Write the numbers, the picture of the answers and, where it was measured, the energy."""
    name = Path(cfg.checkpoint).stem  # several checkpoints may share a folder
    written = [folder / f"{name}.test.json", folder / f"{name}.predictions.png"]
    settings = plain(cfg, without=("config", "output_dir", "energy"))
    settings["recipe"] = Path(cfg.config).stem
    content = {**next(iter(results.values())), "published_top1": figures, **settings, **log.provenance()}
    if cfg.both_membranes:
        content["membranes"] = results
    if energy:
        content["energy"] = energy.summary()
        written += energy.write(folder, name)
    log.write_whole(written[0], json.dumps(content, indent=2) + "\n")
    gallery.draw(written[1])
    logger.info(f"written: {', '.join(map(str, written))}")
