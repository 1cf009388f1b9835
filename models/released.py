"""Checkpoint names of released code, translated to this project's and back: QKFormer, MS-QKFormer and the rivals.

Each released model spells the same modules in its own way. A `Naming` holds one spelling. Weights of 1x1
convolutions may have other trailing ones in their shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .backbone import Backbone
from .qkformer import HierarchicalSpikingTransformer


@dataclass(frozen=True)
class Naming:
    """Spelling of one released code base: `{}` in a pattern stands for "conv" or "bn"."""

    first_units: tuple[str, ...]  # 3x3 units of the first stage
    first_shortcut: str
    later_units: tuple[str, ...]  # 3x3 units of the later stages
    attention: Mapping[str, str]  # attention kind -> module name
    mlp: tuple[str, str]
    embed: str = "patch_embed{}"  # {}: number of the stage
    blocks: str = "stage{}"
    conv: str = "conv"  # in blocks
    dims: tuple[int, int] = (3, 4)  # of the weights in attention and MLP
    unused: Mapping[str, tuple] = field(default_factory=dict)  # entry without effect -> shape; {}: number of the block


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

_SPS = ("proj_{}", "proj_{}1", "proj_{}2", "proj_{}3", "rpe_{}")
_NORMS = {f"block.{{}}.norm{i}.{leaf}": ("C",) for i in (1, 2) for leaf in ("weight", "bias")}
_NORM = {"pos_embed": (1, 64, "C"), "norm.weight": ("C",), "norm.bias": ("C",)}
_FLAT = {"first_shortcut": "", "later_units": (), "embed": "patch_embed", "blocks": "block"}
_SPIKFORMER = Naming(_SPS, attention={"self": "attn"}, mlp=_FC, unused=_NORMS, **_FLAT)
_SPIKINGFORMER = replace(_SPIKFORMER, first_units=("proj_{}", *(f"proj{i}_{{}}" for i in range(1, 5))), mlp=_MLP)
_TALKING_HEADS = {"block.{}.attn.talking_heads.weight": ("h", "h", 1)}
RIVAL_NAMINGS = {  # of a family, or of its networks for one kind of data
    "spikformer": _SPIKFORMER,
    "spikformer_cifar": replace(_SPIKFORMER, conv="linear", dims=(2, 2)),
    "spikformer_dvs": replace(_SPIKFORMER, dims=(3, 3), unused=_NORMS | _NORM),
    "spikingformer": _SPIKINGFORMER,
    "spikingformer_cifar": replace(_SPIKINGFORMER, first_units=tuple(f"block{i}_{{}}" for i in range(5))),
    "sdt": replace(_SPIKFORMER, attention={"sdsa": "attn"}, dims=(4, 4), unused=_TALKING_HEADS),
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
        return f"{naming.embed.format(stage + 1)}.{pattern.format(kind)}.{leaf}" if pattern else None
    block, part = f"{naming.blocks.format(stage + 1)}.{match['block']}", match["part"]
    kind = naming.conv if kind == "conv" else kind
    if part in ("fc1", "fc2"):
        return f"{block}.mlp.{naming.mlp[part == 'fc2'].format(kind)}.{leaf}"
    attn = naming.attention.get(attention[stage])
    return None if attn is None else f"{block}.{attn}.{part}_{kind}.{leaf}"


def _key_map(model: Backbone, naming: Naming) -> dict[str, str]:
    names = {key: _rename(key, naming, model.attention) for key in model.state_dict()}
    return {released: key for key, released in names.items() if released is not None}


def _is_rival(model: Backbone) -> bool:
    return not isinstance(model, HierarchicalSpikingTransformer)


def _own_naming(model: Backbone) -> Naming:
    """Return the spelling of the model's family; raise as `released_key_map` does."""
    if _is_rival(model):
        data = "dvs" if model.in_chans == 2 else "cifar" if model.pools == "0011" else "imagenet"
        return RIVAL_NAMINGS.get(f"{model.family}_{data}", RIVAL_NAMINGS[model.family])
    if unknown := set(model.attention) - {"token", "self"}:
        raise ValueError(f"{unknown.pop()} attention was never released, so its weights have no released names")
    if model.residual == "ms" and model.family != "imagenet":
        raise ValueError(f"residual='ms' was released for the imagenet family only, not for {model.family!r}")
    return NAMINGS["ms" if model.residual == "ms" else model.family]


def released_key_map(model: Backbone) -> dict[str, str]:
    """Return {released name: this project's name} of every state-dict entry, in the spelling of the model's family.

    Raises:
        ValueError: the model has channel attention, or "ms" residuals outside the ImageNet family. No weights of
            either were released.
    """
    return _key_map(model, _own_naming(model))


def to_released(model: Backbone) -> dict[str, Tensor]:
    """Return the model's state dict under its released names, with the entries that the released code never reads.

    Raises as `released_key_map` does.
    """
    naming, state, entries = _own_naming(model), model.state_dict(), {}
    for released, key in _key_map(model, naming).items():
        value = state[key]
        if ".blocks." in key and key.endswith("conv.weight"):
            dims = naming.dims[".mlp." in key]
            value = value.reshape(value.shape[:2] + (1,) * (dims - 2))
        entries[released] = value
    blocks = model.stages[0].blocks
    sizes = {"C": model.num_features, "h": blocks[0].attn.heads}
    for pattern, shape in naming.unused.items():
        for name in dict.fromkeys(pattern.format(i) for i in range(len(blocks))):
            fill = torch.ones if name.endswith("weight") else torch.zeros
            entries[name] = fill([sizes.get(size, size) for size in shape])
    return entries


def load_released(model: Backbone, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights under any released spelling or this project's names, strictly.

    Raises:
        ValueError: an entry is missing, foreign, or of another shape: the message lists 20 of each kind in the
            spelling of the weights, and nothing is loaded.
    """
    weights = _read_by(model, without_prefixes(state_dict))
    spelled = {key: name for name, key in _naming(model, weights).items()}
    wanted = {spelled.get(key, key): value.shape for key, value in model.state_dict().items()}
    sizes = {name: (tuple(weights[name].shape), tuple(shape)) for name, shape in wanted.items() if name in weights}
    problems = [
        *_listing("missing", [name for name in wanted if name not in weights]),
        *_listing("foreign", [name for name in weights if name not in wanted]),
        *_listing("of another shape", [f"{n} (checkpoint {a}, model {b})" for n, (a, b) in sizes.items() if a != b]),
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(problems))
    model.load_state_dict(translated(weights, model))


def without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries without the prefixes of wrappers ("module." and others); a duplicate keeps its own."""
    weights = {}
    for name, value in state_dict.items():
        short = PREFIXES.sub("", name)
        weights[name if short in weights else short] = value
    return weights


def translated(state_dict: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """Return the entries under this project's names; one that the model does not have keeps its name."""
    weights = _read_by(model, without_prefixes(state_dict))
    names = _naming(model, weights)
    return {names.get(name, name): value for name, value in weights.items()}


def _read_by(model: Backbone, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a rival reads of released weights, in the model's shapes; other networks' stay as they are."""
    if not _is_rival(model):
        return weights
    names, wanted = _naming(model, weights), model.state_dict()
    patterns = {pattern for naming in _namings(model) for pattern in naming.unused}
    unused = re.compile("|".join(re.escape(pattern).replace(r"\{\}", r"\d+") for pattern in patterns))
    weights = {name: value for name, value in weights.items() if not unused.fullmatch(name)}
    for name, value in weights.items():
        shape = wanted[names[name]].shape if name in names else value.shape
        if value.shape[:2] == shape[:2] and value.numel() == shape.numel():
            weights[name] = value.reshape(shape)
    return weights


def accept_released(model: Backbone, state_dict: dict, prefix: str, *_) -> None:
    """Let `load_state_dict` take any spelling: a hook that torch calls before it loads."""
    inside = [name for name in state_dict if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): state_dict.pop(name) for name in inside}
    state_dict.update({prefix + name: value for name, value in translated(weights, model).items()})


def _namings(model: Backbone) -> list[Naming]:
    """Return the spellings of a model; those of networks with equal shapes and another function are left out."""
    if _is_rival(model):
        return [naming for kind, naming in RIVAL_NAMINGS.items() if kind.split("_")[0] == model.family]
    return [naming for kind, naming in NAMINGS.items() if (kind == "ms") == (model.residual == "ms")]


def _naming(model: Backbone, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {name: this project's name} in the spelling that most entries have."""
    spellings = [{key: key for key in model.state_dict()}, *(_key_map(model, naming) for naming in _namings(model))]
    return max(spellings, key=lambda names: len(names.keys() & weights.keys()))


def _listing(what: str, names: list[str], most: int = 20) -> list[str]:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{more}"] if names else []
