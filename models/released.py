"""Checkpoint names of the released code and of MaxFormer's MS-QKFormer, translated to this project's and back.

Each released model spells the same modules in its own way. A `Naming` holds one spelling; all entries keep
their shapes, so translating is renaming only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .qkformer import HierarchicalSpikingTransformer
from .registry import VARIANTS, create_model


@dataclass(frozen=True)
class Naming:
    """Spelling of one released code base: `{}` in a pattern stands for "conv" or "bn"."""

    first_units: tuple[str, ...]  # 3x3 units of the first SPEDS
    first_shortcut: str
    later_units: tuple[str, ...]  # 3x3 units of the later SPEDS
    attention: Mapping[str, str]  # attention kind -> module name
    mlp: tuple[str, str]


_LATER = ("proj3_{}", "proj4_{}")
_FC, _MLP = ("fc1_{}", "fc2_{}"), ("mlp1_{}", "mlp2_{}")
NAMINGS = {
    "imagenet": Naming(
        ("proj_{}", "proj1_{}", "proj2_{}"), "proj_res_{}", _LATER, {"token": "tssa", "self": "attn"}, _FC
    ),
    "cifar": Naming(("proj_{}", "proj1_{}"), "proj_res_{}", _LATER, {"token": "tssa", "self": "ssa"}, _MLP),
    "dvs": Naming(
        ("proj_{}", "proj1_{}", "proj2_{}", "proj3_{}"),
        "proj_res_{}",
        ("proj_{}", "proj4_{}"),
        {"token": "tssa", "self": "ssa"},
        _MLP,
    ),
    "ms": Naming(("proj_{}", "proj_{}1", "proj_{}2"), "rpe_{}", _LATER, {"token": "attn", "self": "attn"}, _FC),
}
_ENTRY = re.compile(
    r"stages\.(?P<stage>\d+)\.(embed\.(units\.(?P<unit>\d+)|shortcut)|blocks\.(?P<block>\d+)\.(attn|mlp)\.(?P<part>\w+))"
    r"\.(?P<kind>conv|bn)\.(?P<leaf>\w+)"
)


def _rename(key: str, naming: Naming, attention: tuple[str, ...]) -> str | None:
    """Return the released name of one entry; None where this naming has no word for it."""
    match = _ENTRY.fullmatch(key)
    if match is None:
        return key  # the head has one name everywhere
    stage, kind, leaf = int(match["stage"]), match["kind"], match["leaf"]
    if match["block"] is None:
        units = naming.later_units if stage else naming.first_units
        if match["unit"] is None:
            pattern = "proj_res_{}" if stage else naming.first_shortcut
        elif int(match["unit"]) < len(units):
            pattern = units[int(match["unit"])]
        else:
            return None
        return f"patch_embed{stage + 1}.{pattern.format(kind)}.{leaf}"
    block, part = f"stage{stage + 1}.{match['block']}", match["part"]
    if part in ("fc1", "fc2"):
        return f"{block}.mlp.{naming.mlp[part == 'fc2'].format(kind)}.{leaf}"
    attn = naming.attention.get(attention[stage])
    return None if attn is None else f"{block}.{attn}.{part}_{kind}.{leaf}"


def _key_map(model: HierarchicalSpikingTransformer, naming: Naming) -> dict[str, str]:
    names = {key: _rename(key, naming, model.attention) for key in model.state_dict()}
    return {released: key for key, released in names.items() if released is not None}


def released_key_map(model: HierarchicalSpikingTransformer) -> dict[str, str]:
    """Return {released name: this project's name} of every state-dict entry, in the spelling of the model's family.

    Raises:
        ValueError: the model has channel attention, or "ms" residuals outside the ImageNet family. No weights of
            either were released.
    """
    if unknown := set(model.attention) - {"token", "self"}:
        raise ValueError(f"{unknown.pop()} attention was never released, so its weights have no released names")
    if model.family not in NAMINGS:
        raise ValueError(f"the released code has no {model.family}, so its weights have no released names")
    if model.residual == "ms" and model.family != "imagenet":
        raise ValueError(f"residual='ms' was released for the imagenet family only, not for {model.family!r}")
    return _key_map(model, NAMINGS["ms" if model.residual == "ms" else model.family])


def to_released(model: HierarchicalSpikingTransformer) -> dict[str, Tensor]:
    """Return the model's state dict under its released names; raises as `released_key_map` does."""
    state = model.state_dict()
    return {released: state[key] for released, key in released_key_map(model).items()}


def load_released(model: HierarchicalSpikingTransformer, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights under any released spelling (also with `module.` in front) into `model`, strictly.

    Raises:
        ValueError: an entry is missing, foreign, or of another shape: the message lists 20 of each kind, and nothing
            is loaded. Or the model has no released names, see `released_key_map`.
    """
    released_of = {key: released for released, key in released_key_map(model).items()}
    key_of = {}
    for kind, naming in NAMINGS.items():
        if (kind == "ms") != (model.residual == "ms"):
            continue  # equal shapes, another function: weights of the one are foreign to the other
        key_of |= _key_map(model, naming)
    state, wanted, foreign = {}, model.state_dict(), []
    for name, value in state_dict.items():
        key = key_of.get(name.removeprefix("module."))
        if key is None or key in state:
            foreign.append(name)
        else:
            state[key] = value
    problems = _listing("missing", [released_of[key] for key in wanted if key not in state])
    problems += _listing("foreign", foreign)
    problems += _listing(
        "of another shape",
        [
            f"{released_of[key]} (checkpoint {tuple(value.shape)}, model {tuple(wanted[key].shape)})"
            for key, value in state.items()
            if value.shape != wanted[key].shape
        ],
    )
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))
    model.load_state_dict(state)


def identify(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, object]]:
    """Return name and arguments of the variant that these weights fit, from entries' names and shapes alone.

    `time_steps`, `ssa_membrane` and the resolution leave no trace in shapes. Under this project's names, neither do
    `attention` and `residual`; their defaults are assumed.

    Raises:
        ValueError: they fit none.
    """
    shapes = {name.removeprefix("module."): tuple(value.shape) for name, value in state_dict.items()}
    if len(shapes.get("head.weight", ())) == 2:
        classes, width = shapes["head.weight"]
        for name, variant in VARIANTS.items():
            for residual in ("sew", "ms") if variant["width"] == width else ():
                if fitting := _fitting(shapes, name, {"num_classes": classes, "residual": residual}):
                    return name, fitting
    raise ValueError(f"these weights fit none of {', '.join(sorted(VARIANTS))} as released")


def _fitting(shapes: dict[str, tuple[int, ...]], name: str, arguments: dict) -> dict[str, object] | None:
    """Return the arguments that give the variant entries of these names and shapes; None if there are none."""
    with torch.device("meta"):
        model = create_model(name, **arguments)
    spellings = [{key: key for key in model.state_dict()}]
    if model.family == "imagenet" or (arguments["residual"] == "sew" and model.family in NAMINGS):
        spellings.append({key: released for released, key in released_key_map(model).items()})
    for spelling in spellings:
        if set(spelling.values()) != set(shapes):
            continue
        first_conv = shapes[spelling["stages.0.embed.units.0.conv.weight"]]
        fc1 = shapes[spelling["stages.0.blocks.0.mlp.fc1.conv.weight"]]
        if len(first_conv) != 4 or len(fc1) != 4 or 0 in fc1:
            continue
        arguments = {**arguments, "in_channels": first_conv[1], "mlp_ratio": fc1[0] / fc1[1]}
        with torch.device("meta"):
            wanted = create_model(name, **arguments).state_dict()
        if all(shapes[spelling[key]] == tuple(value.shape) for key, value in wanted.items()):
            if arguments["mlp_ratio"] == 4 and "mlp_ratio" not in VARIANTS[name]:
                del arguments["mlp_ratio"]  # of the other variants there is more than one in use
            return arguments
    return None


def _listing(what: str, names: list[str], most: int = 20) -> list[str]:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{more}"] if names else []
