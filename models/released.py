"""Translation between this project's names and those in released checkpoints of QKFormer, MS-QKFormer and the rivals.

Each released model has its own spelling of the same modules, a `Naming`. Weights of 1x1 convolutions
may have more or fewer trailing dimensions of size 1.
"""

import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .backbone import Backbone
from .neuron import require
from .qkformer import HierarchicalSpikingTransformer


def _units(patterns: str, shortcut: str = "proj_res_{}") -> dict[str, str]:
    return {f"units.{i}": pattern for i, pattern in enumerate(patterns.split())} | {"shortcut": shortcut}


class Naming(NamedTuple):
    """Spelling of one released code base; `{}` in a pattern stands for "conv" or "bn"."""

    first: Mapping[str, str]  # unit of the first patch embedding -> pattern
    later: Mapping[str, str] = _units("proj3_{} proj4_{}")  # of later stages; empty if there is one stage
    token: str = "tssa"  # module of the token attention
    ssa: str = "attn"  # module of the self-attention
    mlp: str = "fc"  # units of the MLP, without their number
    conv: str = "conv"  # in blocks
    dims: tuple[int, int] = (3, 4)  # of the weights in attention and MLP
    unused: tuple[tuple[str, tuple], ...] = ()  # entries without effect and their shapes; {}: number of the block


_NORMS = tuple((f"block.{{}}.norm{i}.{leaf}", ("C",)) for i in (1, 2) for leaf in ("weight", "bias"))
_NORM = (("pos_embed", (1, 64, "C")), ("norm.weight", ("C",)), ("norm.bias", ("C",)))
_SPIKFORMER = Naming(_units("proj_{} proj_{}1 proj_{}2 proj_{}3 rpe_{}", ""), later={}, unused=_NORMS)
_SPIKINGFORMER = _SPIKFORMER._replace(first=_units("proj_{} proj1_{} proj2_{} proj3_{} proj4_{}", ""), mlp="mlp")
_DVS = _units("proj_{} proj1_{} proj2_{} proj3_{}"), _units("proj_{} proj4_{}")
NAMINGS = {  # kind of network, and perhaps of data -> spelling
    "sew_imagenet": Naming(_units("proj_{} proj1_{} proj2_{}")),
    "sew_cifar": Naming(_units("proj_{} proj1_{}"), ssa="ssa", mlp="mlp"),
    "sew_dvs": Naming(*_DVS, ssa="ssa", mlp="mlp"),
    "ms_imagenet": Naming(_units("proj_{} proj_{}1 proj_{}2", "rpe_{}"), token="attn"),
    "spikformer": _SPIKFORMER,
    "spikformer_cifar": _SPIKFORMER._replace(conv="linear", dims=(2, 2)),
    "spikformer_dvs": _SPIKFORMER._replace(dims=(3, 3), unused=_NORMS + _NORM),
    "spikingformer": _SPIKINGFORMER,
    "spikingformer_cifar": _SPIKINGFORMER._replace(
        first=_units("block0_{} block1_{} block2_{} block3_{} block4_{}", "")
    ),
    "sdt": _SPIKFORMER._replace(dims=(4, 4), unused=(("block.{}.attn.talking_heads.weight", ("h", "h", 1)),)),
}
PREFIXES = re.compile(r"^((module|_orig_mod|model)\.)+")  # of data parallelism, torch.compile, Lightning
_ENTRY = re.compile(r"stages\.(\d+)\.(?:embed|blocks\.(\d+)\.(attn|mlp))\.(units\.\d+|\w+)\.(conv|bn)\.(\w+)")


def _rename(key: str, naming: Naming, attention: tuple[str, ...]) -> str | None:
    """Return the released name of an entry; None or "" if this spelling has none."""
    match = _ENTRY.fullmatch(key)
    if match is None:
        return key  # the head has one name everywhere
    stage, block, branch, part, kind, leaf = match.groups()
    number = int(stage) + 1 if naming.later else ""
    if block is None:
        pattern = (naming.later if int(stage) else naming.first).get(part)
        return pattern and f"patch_embed{number}.{pattern.format(kind)}.{leaf}"
    if branch == "mlp":
        part = part.replace("fc", naming.mlp)
    else:
        branch = {"token": naming.token, "self": naming.ssa, "sdsa": naming.ssa}.get(attention[int(stage)])
    kind = naming.conv if kind == "conv" else kind
    return branch and f"{'stage' if naming.later else 'block'}{number}.{block}.{branch}.{part}_{kind}.{leaf}"


def _key_map(model: Backbone, naming: Naming) -> dict[str, str]:
    names = {_rename(key, naming, model.attention): key for key in model.state_dict()}
    return {released: key for released, key in names.items() if released}


def _kind(model: Backbone) -> tuple[str, str]:
    """Return the kinds of network and of data, which make a key of `NAMINGS`."""
    if isinstance(model, HierarchicalSpikingTransformer):
        return model.residual, model.family
    return model.family, "dvs" if model.in_chans == 2 else "cifar" if model.pools == "0011" else "imagenet"


def _family_naming(model: Backbone) -> Naming:
    """Return the spelling of the model's family."""
    unknown = sorted({*model.attention} - {"token", "self", "sdsa"})
    require(not unknown, f"attention={unknown}: has no released names")
    kind, data = _kind(model)
    naming = NAMINGS.get(f"{kind}_{data}") or NAMINGS.get(kind)
    require(naming is not None, f"residual={kind!r}: released for the imagenet family only, not for {data!r}")
    return naming


def released_key_map(model: Backbone) -> dict[str, str]:
    """Return {released name: this project's name} of the state dict, in the spelling of the model's family.

    Other attentions than the released ones, and "ms" residuals outside the ImageNet family, raise `ValueError`.
    """
    return _key_map(model, _family_naming(model))


def to_released(model: Backbone) -> dict[str, Tensor]:
    """Return the state dict under its released names, with the entries that the released code never reads."""
    naming, state, entries = _family_naming(model), model.state_dict(), {}
    for released, key in _key_map(model, naming).items():
        value = state[key]
        if ".blocks." in key and key.endswith("conv.weight"):
            dims = naming.dims[".mlp." in key]
            value = value.reshape(value.shape[:2] + (1,) * (dims - 2))
        entries[released] = value
    blocks = model.stages[0].blocks
    sizes = {"C": model.num_features, "h": blocks[0].attn.heads}
    for pattern, shape in naming.unused:
        for name in {pattern.format(i): None for i in range(len(blocks))}:
            entries[name] = torch.full([sizes.get(size, size) for size in shape], float(name.endswith("weight")))
    return entries


def load_released(model: Backbone, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights under any released spelling or this project's names, strictly.

    If entries are missing, unknown or of another shape, `ValueError` lists them in the spelling of the weights.
    """
    weights, names = _read(state_dict, model)
    spelled, wanted = {key: name for name, key in names.items()}, model.state_dict()
    listings = {
        "missing": [spelled.get(key, key) for key in wanted if key not in weights],
        "unknown": [key for key in weights if key not in wanted],
        "of another shape": [
            f"{spelled.get(key, key)} (checkpoint {tuple(weights[key].shape)}, model {tuple(value.shape)})"
            for key, value in wanted.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
        for what, names in listings.items()
        if names
    ]
    require(not problems, "checkpoint: does not fit the model: " + "; ".join(problems))
    model.load_state_dict(weights)


def without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut prefixes of wrappers, such as "module.", from the names, unless that gives duplicates."""
    weights = {}
    for name, value in state_dict.items():
        short = PREFIXES.sub("", name)
        weights[name if short in weights else short] = value
    return weights


def translated(state_dict: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """Return the entries under this project's names; unknown entries keep theirs."""
    return _read(state_dict, model)[0]


def _read(state_dict: Mapping[str, Tensor], model: Backbone) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the entries under this project's names and in its shapes, and {name: this project's name}.

    Spellings of other kinds of network do not count, because equal shapes may compute another function.
    """
    weights, wanted, kind = without_prefixes(state_dict), model.state_dict(), _kind(model)[0]
    namings = [naming for name, naming in NAMINGS.items() if name.split("_")[0] == kind]
    spellings = [{key: key for key in wanted}, *(_key_map(model, naming) for naming in namings)]
    names = max(spellings, key=lambda names: len(names.keys() & weights.keys()))
    unused = {re.escape(pattern).replace(r"\{\}", r"\d+") for naming in namings for pattern, _ in naming.unused}
    entries = {}
    for name, value in weights.items():
        if not re.fullmatch("|".join(unused), name):
            key = names.get(name, name)
            shape = wanted[key].shape if key in wanted else value.shape
            fits = value.shape[:2] == shape[:2] and value.numel() == shape.numel() and value.shape != shape
            entries[key] = value.reshape(shape) if fits else value
    return entries, names


def accept_released(model: Backbone, state_dict: dict, prefix: str, *_) -> None:
    """Translate weights in any spelling; a hook that torch calls before it loads them."""
    inside = [name for name in state_dict if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): state_dict.pop(name) for name in inside}
    state_dict.update({prefix + name: value for name, value in received(weights, model).items()})


def received(state_dict: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """Return `translated` weights; warn if they were trained with another `ssa_membrane` than the model's."""
    weights, names = _read(state_dict, model)
    leaked = any(".attn.v." in key for name, key in names.items() if name != key) and _kind(model)[0] == "sew"
    if leaked and model.ssa_membrane != "released":
        warnings.warn('released weights: trained with another membrane; use ssa_membrane="released"', stacklevel=2)
    return weights
