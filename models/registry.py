"""Variants of the networks, `create_model`, and the registration with timm."""

import re
import warnings
from collections.abc import Callable, Mapping

import timm
import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .backbone import ALIASES, Backbone
from .backends import set_lif_backend
from .neuron import require, require_choice
from .qkformer import HierarchicalSpikingTransformer
from .released import accept_released, received, translated, without_prefixes
from .rivals import FAMILIES, RIVALS, SpikingTransformer

_IMAGENET = {"family": "imagenet", "depths": (1, 2, 7)}
_CIFAR = {"family": "cifar", "heads": 8}
_DVS = {"family": "dvs", "depths": (1, 1), "heads": 16, "mlp_ratio": 1, "attention": ("token", "self")}
_DVS |= {"time_steps": 16}
QKFORMERS = {  # arguments of `HierarchicalSpikingTransformer`
    "qkformer_10_384": {**_IMAGENET, "width": 384, "heads": 6},
    "qkformer_10_512": {**_IMAGENET, "width": 512, "heads": 8},
    "qkformer_10_768": {**_IMAGENET, "width": 768, "heads": 12},
    "qkformer_4_384": {**_CIFAR, "width": 384, "depths": (1, 1, 2)},
    "qkformer_4_256": {**_IMAGENET, "width": 256, "depths": (1, 1, 2), "heads": 8},
    "qkformer_3_64": {**_CIFAR, "width": 64, "depths": (1, 1, 1)},
    "qkformer_2_256": {**_DVS, "width": 256},
    "qkformer_2_64": {**_DVS, "width": 64},
}
VARIANTS = QKFORMERS | RIVALS  # `default_cfgs` has their channels and classes
RELEASED = {  # tag -> resolution and md5 of the released file, trained with ssa_membrane="released"
    "qkformer_10_384.in1k": (224, "60df416983ae326bb14bdb4566444320"),
    "qkformer_10_512.in1k": (224, "85dd1f94c87ba5ec908fed5d0a3f7f69"),
    "qkformer_10_768.in1k": (224, "dc1595408ed1bd40346be2bdaf5015d5"),
    "qkformer_10_768.in1k_288": (288, "ba20af8eb450d4ec9c71009fde8e7125"),
    "qkformer_10_768.in1k_384": (384, "99a671118f67a680aa38b6ac5aae449a"),
}


def _cfg(size: int, channels: int = 3, stride: int = 16, **more) -> dict:
    layers = {"pool_size": (size // stride,) * 2, "first_conv": "stages.0.embed.units.0.conv", "classifier": "head"}
    return {"input_size": (channels, size, size), "crop_pct": 0.875 if size == 224 else 1.0, **layers, **more}


_CIFAR_DATA = {"size": 32, "stride": 4, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
_DVS_DATA = {"channels": 2, "mean": (0.0, 0.0), "std": (1.0, 1.0)}
_DIGITS = {"channels": 1, "size": 8, "stride": 4, "mean": (0.305,), "std": (0.376,), "num_classes": 10}
_CIFAR_NETWORKS = "qkformer_4_384 spikformer_4_384 spikingformer_4_384 sdt_2_512"
_TAGS = (  # tag of a data set, its networks, timm's configuration; a network's first tag is its default
    ("in1k", " ".join(name for name in RIVALS if "_8_" in name), _cfg(224)),
    ("cifar10", _CIFAR_NETWORKS, _cfg(num_classes=10, **_CIFAR_DATA)),
    ("cifar100", _CIFAR_NETWORKS, _cfg(num_classes=100, **_CIFAR_DATA)),
    ("cifar10", "qkformer_4_256 spikformer_4_256", _cfg(num_classes=10, **_CIFAR_DATA | {"stride": 16})),
    ("digits", "qkformer_3_64 spikformer_3_64", _cfg(**_DIGITS)),
    ("cifar10_dvs", "qkformer_2_256 spikformer_2_256 spikingformer_2_256", _cfg(128, num_classes=10, **_DVS_DATA)),
    ("dvs128_gesture", "qkformer_2_256 spikingformer_2_256", _cfg(128, num_classes=11, **_DVS_DATA)),
    ("dvs128_gesture", "sdt_2_256", _cfg(128, stride=8, num_classes=11, **_DVS_DATA)),
    ("digits_dvs", "qkformer_2_64 spikformer_2_64", _cfg(32, num_classes=10, **_DVS_DATA)),
)
default_cfgs = generate_default_cfgs(
    {tag: _cfg(size, notes=(f"md5 {md5}", "ssa_membrane='released'")) for tag, (size, md5) in RELEASED.items()}
    | {f"{name}.{tag}": cfg for tag, names, cfg in _TAGS for name in names.split()}
)


def list_models() -> list[str]:
    """Return the names of all variants."""
    return sorted(VARIANTS)


def create_model(name: str, **kwargs) -> nn.Module:
    """Build a variant by name, as `timm.create_model` does.

    Args:
        name: one of `list_models()`, also in the released spelling `QKFormer_10_384`. A tag of `default_cfgs` sets
            input and classes of a data set ("qkformer_4_384.cifar100").
        **kwargs: `lif_backend` (see `set_lif_backend`), and arguments of `HierarchicalSpikingTransformer` and
            `timm.create_model`. `in_channels` and `drop_path` are aliases of `in_chans` and `drop_path_rate`.
    """
    if ":" not in name:  # a colon marks a source, such as "local-dir:..."
        name = name.lower()
        require_choice("model", name.partition(".")[0], VARIANTS)
    return timm.create_model(name, **kwargs)


def _network(lif_backend: str = "auto", **kwargs) -> Backbone:
    model = (SpikingTransformer if kwargs["family"] in FAMILIES else HierarchicalSpikingTransformer)(**kwargs)
    set_lif_backend(model, lif_backend)
    model.register_load_state_dict_pre_hook(accept_released)
    return model


def _stage_weights(state_dict: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """Return the entries under this project's names; raise if none fits, because timm may load nothing silently."""
    weights = received(state_dict, model)
    wanted = [name for name in model.state_dict() if name.startswith("stages.") and not name.endswith("lif.w")]
    missing = [name for name in wanted if name not in weights]
    require(
        missing != wanted, f"weights: no name fits the network's, such as {wanted[0]}; check the file and its prefixes"
    )
    if missing:
        warnings.warn(f"weights: {len(missing)} of {len(wanted)} missing, such as {missing[0]}", stacklevel=2)
    return weights


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """Return the function that timm calls to build a variant."""

    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        has_weights = cfg.has_weights or cfg.state_dict or not pretrained
        require(has_weights, f"pretrained=True: {name} has no weights; use pretrained_cfg_overlay={{'file': PATH}}")
        for alias, argument in ALIASES.items():
            if alias in kwargs:
                value = kwargs.pop(alias)
                require(kwargs.setdefault(argument, value) == value, f"{alias}, {argument}: differ; pass one of them")
        arguments = VARIANTS[name] | kwargs
        is_getter = arguments.get("feature_cls", "getter") in ("getter", FeatureGetterNet)
        require(is_getter, f"feature_cls={arguments.get('feature_cls')!r}: modules keep the time axis; use 'getter'")
        features = {"feature_cls": "getter", "out_indices": tuple(range(len(arguments.get("depths", (0,)))))}
        return build_model_with_cfg(
            _network, name, pretrained, feature_cfg=features, pretrained_filter_fn=_stage_weights, **arguments
        )

    build.__name__ = build.__qualname__ = name
    return build


for _name in VARIANTS:
    globals()[_name] = register_model(_entrypoint(_name))
register_model_deprecations(__name__, {name.replace("qkf", "QKF"): name for name in VARIANTS if name.startswith("qk")})


def identify(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, object]]:
    """Return name and arguments of the variant that fits the names and shapes of these weights.

    Shapes do not show `time_steps`, `ssa_membrane` and resolution. Under this project's names they do not show
    `attention` and `residual` either; the defaults are assumed.
    """
    weights = without_prefixes(state_dict)

    def shape(layer: str) -> tuple[int, ...]:
        """Return the shape of the first weight of a layer whose name matches."""
        names = (name for name in weights if re.fullmatch(rf"{layer}\.weight", name))
        return next((tuple(weights[name].shape) for name in names), ())

    head, first_conv = shape("head"), shape(r"(stages\.0\.embed\.units\.0\.|patch_embed1?\.(proj|block0)_)conv")
    fc1 = shape(r"(stage|block).*\.mlp\.(fc1|mlp1)[._](conv|linear)")
    if (len(head), len(first_conv)) == (2, 4) and len(fc1) >= 2 and 0 not in fc1:
        arguments = {"num_classes": head[0], "in_channels": first_conv[1], "mlp_ratio": fc1[0] / fc1[1]}
        for name, variant in VARIANTS.items():
            kinds = ("sew", "ms") if variant["family"] == "imagenet" else ("sew",)
            for residual in [{"residual": kind} for kind in kinds] if name in QKFORMERS else [{}]:
                candidate = arguments | residual
                if variant["width"] == head[1] and _fits(weights, name, candidate):
                    if candidate["mlp_ratio"] == 4 and "mlp_ratio" not in variant:
                        del candidate["mlp_ratio"]  # the default; DVS networks have 1 or 4
                    return name, candidate
    raise ValueError(f"weights: fit none of {', '.join(list_models())} as released")


def _fits(weights: Mapping[str, Tensor], name: str, arguments: dict) -> bool:
    with torch.device("meta"):
        wanted = (model := create_model(name, **arguments)).state_dict()
    entries = translated(weights, model)
    return {key: value.shape for key, value in wanted.items()} == {key: value.shape for key, value in entries.items()}
