"""What was published: the released ImageNet checkpoints, and the accuracies beside which ours are printed."""

import hashlib
from pathlib import Path

from .cli import UserError
from .config import MODEL_FIELDS, Config, read

RELEASED = {  # md5 -> recipe in imagenet/
    "60df416983ae326bb14bdb4566444320": "qkformer_10_384",
    "85dd1f94c87ba5ec908fed5d0a3f7f69": "qkformer_10_512",
    "dc1595408ed1bd40346be2bdaf5015d5": "qkformer_10_768",
    "ba20af8eb450d4ec9c71009fde8e7125": "qkformer_10_768_288",
    "99a671118f67a680aa38b6ac5aae449a": "qkformer_10_768_384",
}


def recipe_of(path: Path, folder: Path) -> Path | None:
    """The recipe in `folder` of a released checkpoint, if the file's md5 is known and there is such a recipe."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    recipe = folder / f"{RELEASED[digest]}.yml" if digest in RELEASED else None
    return recipe if recipe and recipe.exists() else None


def accuracies(cfg: Config, folder: Path) -> dict[str, float]:
    """Published top-1 (percent) by source ("paper", "log") of the recipe or variant with this network and input."""
    recipe = _alike(cfg, folder)
    figures = {"paper": recipe.paper_top1, "log": recipe.log_top1} if recipe else {}
    return {source: value for source, value in figures.items() if value is not None}


def energy_mj(cfg: Config, folder: Path) -> float | None:
    """Energy (mJ) in the paper of the recipe or variant with this network and input."""
    recipe = _alike(cfg, folder)
    return recipe and recipe.paper_energy_mj


def _alike(cfg: Config, folder: Path) -> Config | None:
    """The recipe in `folder`, or the variant, with the network and input of `cfg`.

    The membrane of the self-attention may be another one, for the comparison of the two is of interest.
    """
    keys = [key for key in (*MODEL_FIELDS, "input_size", "split_seed") if key != "ssa_membrane"]
    for path in sorted(folder.glob("*.yml")):
        try:
            recipes = read(path).all()
        except UserError:
            continue  # a file of the user's
        for recipe in recipes:
            if all(getattr(recipe, key) == getattr(cfg, key) for key in keys):
                return recipe
    return None
