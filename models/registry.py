"""Table of the variants, `create_model`, and the registration with timm."""

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

from .backbone import Backbone
from .backends import set_lif_backend
from .qkformer import HierarchicalSpikingTransformer
from .released import accept_released, translated, without_prefixes
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
    "qkformer_3_64": {**_CIFAR, "width": 64, "depths": (1, 1, 1)},
    "qkformer_2_256": {**_DVS, "width": 256},
    "qkformer_2_64": {**_DVS, "width": 64},
}
VARIANTS = QKFORMERS | RIVALS  # `default_cfgs` has their channels and classes
RELEASED_MD5 = {  # tags with a released file, trained with ssa_membrane="released"
    "qkformer_10_384.in1k": "60df416983ae326bb14bdb4566444320",
    "qkformer_10_512.in1k": "85dd1f94c87ba5ec908fed5d0a3f7f69",
    "qkformer_10_768.in1k": "dc1595408ed1bd40346be2bdaf5015d5",
    "qkformer_10_768.in1k_288": "ba20af8eb450d4ec9c71009fde8e7125",
    "qkformer_10_768.in1k_384": "99a671118f67a680aa38b6ac5aae449a",
}
FIRST_CONV = "stages.0.embed.units.0.conv"


def _cfg(channels: int = 3, size: int = 224, stride: int = 16, **more) -> dict:
    layers = {"pool_size": (size // stride,) * 2, "first_conv": FIRST_CONV, "classifier": "head"}
    return {"input_size": (channels, size, size), **layers, **more}


def _released(name: str, **more) -> dict:
    return _cfg(notes=(f"md5 {RELEASED_MD5[name]}", "trained with ssa_membrane='released'"), **more)


_CIFAR_DATA = {"size": 32, "stride": 4, "crop_pct": 1.0, "num_classes": 10}
_CIFAR_DATA |= {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
_DVS_DATA = {"channels": 2, "size": 128, "crop_pct": 1.0, "num_classes": 10, "mean": (0.0, 0.0), "std": (1.0, 1.0)}
_DIGITS = {"channels": 1, "size": 8, "stride": 4, "crop_pct": 1.0, "num_classes": 10, "mean": (0.305,), "std": (0.376,)}
_LARGE = {"in1k": {}, "in1k_288": {"size": 288, "crop_pct": 1.0}, "in1k_384": {"size": 384, "crop_pct": 1.0}}
default_cfgs = generate_default_cfgs(
    {name: _released(name, **_LARGE[name.partition(".")[2]]) for name in RELEASED_MD5}
    | {
        "qkformer_4_384.cifar10": _cfg(**_CIFAR_DATA),
        "qkformer_4_384.cifar100": _cfg(**_CIFAR_DATA | {"num_classes": 100}),
        "qkformer_3_64.digits": _cfg(**_DIGITS),
        "qkformer_2_256.cifar10_dvs": _cfg(**_DVS_DATA),
        "qkformer_2_256.dvs128_gesture": _cfg(**_DVS_DATA | {"num_classes": 11}),
        "qkformer_2_64.digits_dvs": _cfg(**_DVS_DATA | {"size": 32}),
    }
    | {f"{name}.in1k": _cfg() for name in RIVALS if "_8_" in name}
    | {f"{name}.cifar10": _cfg(**_CIFAR_DATA) for name in ("spikformer_4_384", "spikingformer_4_384", "sdt_2_512")}
    | {f"{name}.cifar10_dvs": _cfg(**_DVS_DATA) for name in ("spikformer_2_256", "spikingformer_2_256")}
    | {
        "spikformer_3_64.digits": _cfg(**_DIGITS),
        "spikformer_2_64.digits_dvs": _cfg(**_DVS_DATA | {"size": 32}),
    }
)
ALIASES = {"in_channels": "in_chans", "drop_path": "drop_path_rate"}  # this project's names of timm's arguments


def list_models() -> list[str]:
    """Return the names that `create_model` knows."""
    return sorted(VARIANTS)


def create_model(name: str, **kwargs) -> nn.Module:
    """Build a variant by name, as `timm.create_model` does.

    Args:
        name: one of `list_models()`, or `QKFormer_10_384`, the spelling of the released code; a tag of `default_cfgs`
            chooses input and classes of a data set ("qkformer_4_384.cifar100").
        **kwargs: `lif_backend` (see `set_lif_backend`), any argument of `HierarchicalSpikingTransformer` or
            `timm.create_model`; `in_channels` and `drop_path` for timm's `in_chans` and `drop_path_rate`.

    Raises:
        ValueError: unknown name, or a value out of range.
        TypeError: unknown argument.
    """
    if ":" not in name:  # no source, such as "local-dir:..."
        name = name.lower()
        if name.partition(".")[0] not in VARIANTS:
            raise ValueError(f"model {name!r} is unknown: choose one of {', '.join(list_models())}")
    return timm.create_model(name, **kwargs)


def _network(lif_backend: str = "auto", **kwargs) -> Backbone:
    model = (SpikingTransformer if kwargs["family"] in FAMILIES else HierarchicalSpikingTransformer)(**kwargs)
    set_lif_backend(model, lif_backend)
    model.register_load_state_dict_pre_hook(accept_released)
    return model


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """Return timm's builder of a variant."""

    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if pretrained and not (cfg.has_weights or cfg.state_dict):
            raise ValueError(
                f"pretrained=True: no weights of {name} can be downloaded; get the authors' file (its link is on "
                "github.com/zhouchenlin2096/QKFormer) and use pretrained_cfg_overlay={'file': PATH}"
            )
        for alias, argument in ALIASES.items():
            if alias in kwargs and kwargs.setdefault(argument, kwargs[alias]) != kwargs.pop(alias):
                raise ValueError(f"{alias} and {argument} differ; they are two names of one argument")
        arguments = VARIANTS[name] | kwargs
        if arguments.get("feature_cls", "getter") not in ("getter", FeatureGetterNet):
            raise ValueError(f"feature_cls={arguments['feature_cls']!r}: modules keep the time axis; use 'getter'")
        features = {"feature_cls": "getter", "out_indices": tuple(range(len(arguments.get("depths", (0,)))))}
        return build_model_with_cfg(
            _network, name, pretrained, feature_cfg=features, pretrained_filter_fn=translated, **arguments
        )

    build.__name__ = build.__qualname__ = name
    return build


for _name in VARIANTS:
    globals()[_name] = register_model(_entrypoint(_name))
register_model_deprecations(__name__, {name.replace("qkf", "QKF"): name for name in VARIANTS if name.startswith("qk")})


def identify(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, object]]:
    """Return name and arguments of the variant that these weights fit, from entries' names and shapes alone.

    `time_steps`, `ssa_membrane` and the resolution leave no trace in shapes. Under this project's names, neither do
    `attention` and `residual`; their defaults are assumed.

    Raises:
        ValueError: they fit none.
    """
    weights = without_prefixes(state_dict)
    head = tuple(weights["head.weight"].shape) if "head.weight" in weights else ()
    for name, variant in VARIANTS.items():
        if len(head) == 2 and variant["width"] == head[1]:
            for residual in ("sew", "ms") if variant["family"] == "imagenet" else ("sew",):
                if arguments := _fitting(weights, name, {"num_classes": head[0], "residual": residual}):
                    return name, arguments
    raise ValueError(f"these weights fit none of {', '.join(list_models())} as released")


def _fitting(weights: Mapping[str, Tensor], name: str, arguments: dict) -> dict[str, object] | None:
    """Return the arguments that give the variant entries of these names and shapes; None if there are none."""
    with torch.device("meta"):
        model = create_model(name, **arguments)
    shapes = {key: tuple(value.shape) for key, value in translated(weights, model).items()}
    if shapes.keys() != model.state_dict().keys():
        return None
    first_conv, fc1 = shapes[f"{FIRST_CONV}.weight"], shapes["stages.0.blocks.0.mlp.fc1.conv.weight"]
    if len(first_conv) != 4 or len(fc1) != 4 or 0 in fc1:
        return None
    arguments |= {"in_channels": first_conv[1], "mlp_ratio": fc1[0] / fc1[1]}
    with torch.device("meta"):
        model = create_model(name, **arguments)
    if any(shapes[key] != tuple(value.shape) for key, value in model.state_dict().items()):
        return None
    if arguments["mlp_ratio"] == 4 and "mlp_ratio" not in VARIANTS[name]:
        del arguments["mlp_ratio"]  # of the other variants there is more than one in use
    return arguments
