"""The architecture of a network as a figure, drawn from the network as it is built: its shapes are those that a forward
pass on the meta device leaves, its parameters are counted, and the attention's spikes are computed by its modules.

Writes NAME.svg and NAME.png; NAME is architecture by default. DVS models get event frames, all others images.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

from engine.cli import UserError
from models import create_model, list_models

from .common import main, parser, recipes
from .diagram import Drawing

STYLE = {"svg.hashsalt": "qkformer", "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"}


def published_size(name: str) -> int:
    """Height and width of the inputs in the model's first recipe.

    Raises:
        UserError: no recipe has the model.
    """
    for _, cfg in recipes():
        if cfg.model == name:
            return cfg.input_size
    raise UserError(f"--input-size is needed: no recipe has {name}")


def run(argv: Sequence[str]) -> None:
    ours = parser(__doc__)
    ours.add_argument("--model", default="qkformer_10_384", help=f"one of {', '.join(list_models())}")
    ours.add_argument("--input-size", type=int, help="height and width (default: that of the model's first recipe)")
    ours.add_argument("--attention", nargs="+", help="token, channel or self for each stage")
    ours.add_argument("--residual", help="sew or ms")
    ours.add_argument("--mlp-ratio", type=float)
    ours.add_argument("--time-steps", type=int, help="T")
    ours.add_argument("--num-classes", type=int)
    ours.add_argument("--output-dir", type=Path, default=Path("output/architecture"), help="folder to write to")
    ours.add_argument("--name", default="architecture", help="of the files (architecture)")
    args = ours.parse_args(argv)
    keys = ("attention", "residual", "mlp_ratio", "time_steps", "num_classes")
    given = {key: value for key in keys if (value := getattr(args, key)) is not None}
    name = args.model.lower()
    with torch.device("meta"):
        try:
            model = create_model(name, **given)
        except ValueError as error:
            raise UserError(str(error)) from None
        size = args.input_size if args.input_size is not None else published_size(name)
        if size < 1:
            raise UserError(f"--input-size {size} must be at least 1")
        steps = (model.time_steps,) if "dvs" in model.family else ()
        x = torch.empty(1, *steps, model.in_channels, size, size)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Drawing(name, model, x).figure
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            path = args.output_dir / f"{args.name}.{kind}"
            figure.savefig(path, dpi=150, metadata=metadata)
            print(path)


if __name__ == "__main__":
    main(run)
