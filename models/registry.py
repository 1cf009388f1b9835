"""Table of the variants, `create_model`, and the registration with timm."""

import difflib
import inspect
from collections.abc import Sequence

import timm

from .backends import set_lif_backend
from .qkformer import HierarchicalSpikingTransformer

_IMAGENET = {"family": "imagenet", "depths": (1, 2, 7)}
_CIFAR = {"family": "cifar", "heads": 8, "num_classes": 10}
_DVS = {"family": "dvs", "depths": (1, 1), "heads": 16, "mlp_ratio": 1, "attention": ("token", "self")}
_DVS |= {"num_classes": 10, "in_channels": 2, "time_steps": 16}
_SPIKFORMER = {"embed": "sps", "qkv_bias": True, "attention": ("self",), "mlp_ratio": 4}
VARIANTS = {
    "qkformer_10_384": {**_IMAGENET, "width": 384, "heads": 6},
    "qkformer_10_512": {**_IMAGENET, "width": 512, "heads": 8},
    "qkformer_10_768": {**_IMAGENET, "width": 768, "heads": 12},
    "qkformer_4_384": {**_CIFAR, "width": 384, "depths": (1, 1, 2)},
    "qkformer_3_64": {**_CIFAR, "width": 64, "depths": (1, 1, 1), "in_channels": 1},
    "qkformer_2_256": {**_DVS, "width": 256},
    "qkformer_2_64": {**_DVS, "width": 64},
    "spikformer_4_384": {**_CIFAR, **_SPIKFORMER, "family": "spikformer_cifar", "width": 384, "depths": (4,)}
    | {"heads": 12},
    "spikformer_3_64": {**_CIFAR, **_SPIKFORMER, "family": "spikformer_cifar", "width": 64, "depths": (3,)}
    | {"in_channels": 1},
    "spikformer_2_256": {**_DVS, **_SPIKFORMER, "family": "spikformer_dvs", "width": 256, "depths": (2,)},
    "spikformer_2_64": {**_DVS, **_SPIKFORMER, "family": "spikformer_dvs", "width": 64, "depths": (2,)},
}


def list_models() -> list[str]:
    """Return the names that `create_model` knows."""
    return sorted(VARIANTS)


def create_model(name: str, *, lif_backend: str = "auto", **kwargs) -> HierarchicalSpikingTransformer:
    """Build a variant by name; `QKFormer_10_384`, the spelling of the released code, is accepted too.

    Args:
        name: one of `list_models()`.
        lif_backend: see `set_lif_backend`.
        **kwargs: any argument of `HierarchicalSpikingTransformer`; the variant's row of `VARIANTS` is the default.

    Raises:
        ValueError: unknown name or argument (the message has the nearest valid one), or a value out of range.
    """
    if name.lower() not in VARIANTS:
        raise ValueError(f"model {name!r} is unknown{_nearest(name.lower(), VARIANTS)}")
    known = [*inspect.signature(HierarchicalSpikingTransformer).parameters, "lif_backend"]
    for key in kwargs:
        if key not in known:
            raise ValueError(f"model argument {key!r} is unknown{_nearest(key, known)}")
    model = HierarchicalSpikingTransformer(**{**VARIANTS[name.lower()], **kwargs})
    set_lif_backend(model, lif_backend)
    return model


def _nearest(word: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else f": choose one of {', '.join(sorted(valid))}"


def _register_with_timm(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs):
        if pretrained:
            raise ValueError(f"{name} has no weights to download; load a file with models.released.load_released")
        for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm passes them to every model
            kwargs.pop(unused, None)
        for timm_name, argument in (("in_chans", "in_channels"), ("drop_path_rate", "drop_path")):
            if kwargs.get(timm_name) is not None:
                kwargs[argument] = kwargs[timm_name]
            kwargs.pop(timm_name, None)
        return create_model(name, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    timm.models.register_model(entrypoint)


for _name in VARIANTS:
    _register_with_timm(_name)
