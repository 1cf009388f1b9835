"""Checkpoint names of the released code and of MaxFormer's MS-QKFormer, translated to this project's and back.

Each released model spells the same modules in its own way. A `Naming` holds one spelling; all entries keep
their shapes, so translating is renaming only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .qkformer import HierarchicalSpikingTransformer


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
PREFIXES = re.compile(r"^((module|_orig_mod|model)\.)+")  # of data parallelism, torch.compile, Lightning
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
    """Load weights under any released spelling into `model`, as `load_strictly` does.

    Raises:
        ValueError: see `load_strictly`, and `released_key_map` for models without released names.
    """
    released_key_map(model)
    load_strictly(model, state_dict)


def load_strictly(model: HierarchicalSpikingTransformer, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights under this project's names or any released spelling, with prefixes or without.

    Raises:
        ValueError: an entry is missing, foreign, or of another shape: the message lists 20 of each kind under the
            names of the weights, and nothing is loaded.
    """
    weights = without_prefixes(state_dict)
    if problems := _problems(model, weights, _naming(model, weights)):
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(weights)


def without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries without the prefixes of wrappers ("module." and others); a duplicate keeps its own."""
    weights = {}
    for name, value in state_dict.items():
        short = PREFIXES.sub("", name)
        weights[name if short in weights else short] = value
    return weights


def translated(state_dict: Mapping[str, Tensor], model: HierarchicalSpikingTransformer) -> dict[str, Tensor]:
    """Return the entries under this project's names; one that the model does not have keeps its name."""
    weights = without_prefixes(state_dict)
    names = _naming(model, weights)
    return {names.get(name, name): value for name, value in weights.items()}


def accept_released(model: HierarchicalSpikingTransformer, state_dict: dict, prefix: str, *_) -> None:
    """Let `load_state_dict` take any spelling: a hook that torch calls before it loads."""
    inside = [name for name in state_dict if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): state_dict.pop(name) for name in inside}
    state_dict.update({prefix + name: value for name, value in translated(weights, model).items()})


def _naming(model: HierarchicalSpikingTransformer, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {name: this project's name} in the spelling that most entries have."""
    spellings = [{key: key for key in model.state_dict()}]
    for kind, naming in NAMINGS.items():
        if (kind == "ms") == (model.residual == "ms"):  # equal shapes, another function: foreign to each other
            spellings.append(_key_map(model, naming))
    return max(spellings, key=lambda names: len(names.keys() & weights.keys()))


def _problems(model: nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    wanted = model.state_dict()
    spelled = {key: key for key in wanted} | {key: name for name, key in names.items()}
    known = {name: wanted[names[name]].shape for name in weights if name in names}
    return [
        *_listing("missing", [name for name in spelled.values() if name not in weights]),
        *_listing("foreign", [name for name in weights if name not in names]),
        *_listing(
            "of another shape",
            [
                f"{name} (checkpoint {tuple(weights[name].shape)}, model {tuple(shape)})"
                for name, shape in known.items()
                if shape != weights[name].shape
            ],
        ),
    ]


def _listing(what: str, names: list[str], most: int = 20) -> list[str]:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{more}"] if names else []
