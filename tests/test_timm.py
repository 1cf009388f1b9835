"""Networks through timm: builders, feature maps, heads and checkpoint loading."""

import re
import warnings

import pytest
import timm
import torch
from scripts import refuses
from test_models import images, lively
from timm.data import resolve_model_data_config
from torchvision.models.feature_extraction import create_feature_extractor

import models
from models.registry import RELEASED, VARIANTS, default_cfgs
from models.released import load_released, to_released

SMALL = {"time_steps": 3, "num_classes": 5}


def build(name="qkformer_3_64", **kwargs):
    torch.manual_seed(0)
    return lively(timm.create_model(name, **SMALL | kwargs))


def digits(batch=2, channels=1):
    return images(batch, channels, 8, 12)


@pytest.mark.parametrize("name", [f"{name}.{tag}" for name in VARIANTS for tag in default_cfgs[name].tags])
def test_every_tag_describes_its_network(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        size = model.default_cfg["input_size"]
        features = model.forward_features(torch.empty(1, *size))
    assert size == resolve_model_data_config(model)["input_size"]
    assert len(model.default_cfg["mean"]) == len(model.default_cfg["std"]) == model.in_chans == size[0]
    assert features.shape == (1, model.num_features, *model.default_cfg["pool_size"])
    assert model.get_classifier().out_features == model.num_classes == model.default_cfg["num_classes"]
    assert {model.default_cfg[key] + ".weight" for key in ("first_conv", "classifier")} <= model.state_dict().keys()
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == size[0]


def test_released_files_are_known_by_their_md5():
    for name, (_, md5) in RELEASED.items():
        variant, tag = name.split(".")
        assert f"md5 {md5}" in default_cfgs[variant].cfgs[tag].notes


def test_one_table_for_both_ways_to_create():
    for name in ("qkformer_4_384.cifar100", "QKFormer_10_384"):
        with torch.device("meta"):
            actual, expected = models.create_model(name), timm.create_model(name)
        assert actual.num_classes == expected.num_classes
        assert actual.pretrained_cfg == expected.pretrained_cfg
    aliased = models.create_model("qkformer_3_64", in_channels=2, drop_path=0.2, lif_backend="torch")
    assert aliased.in_channels == aliased.in_chans == aliased.stages[0].embed.units[0].conv.in_channels == 2
    assert aliased.stages[2].blocks[0].drop_path.rate == pytest.approx(0.2)
    assert aliased.fast_path is None
    assert timm.create_model("qkformer_3_64", lif_backend="auto").fast_path is not None
    assert "QKFormer_10_384" not in timm.list_models()


@pytest.mark.parametrize("create", [models.create_model, timm.create_model])
def test_what_cannot_be_created(create):
    with pytest.raises(TypeError, match="time_step'"):
        create("qkformer_3_64", time_step=4)
    with pytest.raises(RuntimeError, match="imagenet"):
        create("qkformer_3_64.imagenet")
    with refuses("qkformer_10_384", "file"):
        create("qkformer_10_384", pretrained=True)
    with refuses("hook"):
        create("qkformer_3_64", features_only=True, feature_cls="hook")


def test_arguments_of_timm_reach_the_network():
    model = build(num_classes=10, drop_rate=1.0, dtype=torch.float64, drop_block_rate=None).train()
    x = digits()
    assert torch.equal(model(x), torch.zeros(2, 10, dtype=torch.float64))  # the head's bias is zero
    assert model.eval()(x).abs().sum() > 0


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", ["qkformer_3_64", "qkformer_2_64"])
def test_feature_maps_are_means_over_time_of_the_stages(name, backend):
    model = build(name, lif_backend="torch")
    x = images(2, 3, 2, 32, 48) if name == "qkformer_2_64" else digits()
    outputs = []
    hooks = [stage.register_forward_hook(lambda *call: outputs.append(call[2])) for stage in model.stages]
    with torch.no_grad():
        logits = model(x)
        for hook in hooks:
            hook.remove()
        assert all(output.unique().numel() > 2 for output in outputs)
        models.set_lif_backend(model, backend)
        assert bool(model.fast_path and model.fast_path(model, x)) == (backend == "auto")
        last, maps = model.forward_intermediates(x)
        assert len(maps) == len(outputs)
        for expected, actual, info in zip(outputs, maps, model.feature_info, strict=True):
            torch.testing.assert_close(actual, expected.mean(0))
            assert actual.shape[1:] == (info["num_chs"], *(-(-n // info["reduction"]) for n in x.shape[-2:]))
        assert torch.equal(last, maps[-1])
        assert torch.equal(last, model.forward_features(x))
        torch.testing.assert_close(model.forward_head(last), logits)
        torch.testing.assert_close(model(x), logits)
        early, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
        assert torch.equal(early, first)
        model.keep_time = True
        torch.testing.assert_close(model.forward_features(x), outputs[-1])


def test_a_backbone_has_the_stages_it_needs_and_learns():
    whole = build(lif_backend="torch")
    backbone = timm.create_model("qkformer_3_64", features_only=True, out_indices=(-2, 0), **SMALL).double()
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([32, 16], [2, 1])
    weights = {
        f"model.{key}": value for key, value in whole.state_dict().items() if not key.startswith(("head", "stages.2"))
    }
    backbone.load_state_dict(weights)
    maps = backbone.eval()(digits())
    assert [tuple(y.shape) for y in maps] == [(2, 16, 8, 12), (2, 32, 4, 6)]
    for expected, actual in zip(whole.forward_intermediates(digits(), 3, intermediates_only=True), maps, strict=False):
        torch.testing.assert_close(actual, expected)
    sum(y.square().sum() for y in backbone.train()(digits())).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_with_membrane_shortcuts_the_head_reads_spikes_not_their_mean():
    model = build("qkformer_4_384", residual="ms", width=96)
    x = images(2, 3, 16, 16)
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        assert features.shape == (2, 96, 4, 4)
        with refuses("keep_time"):
            model.forward_head(features)
        model.keep_time = True
        assert torch.equal(model(x), logits)
        assert torch.equal(model.forward_head(model.forward_features(x)), logits)
        torch.testing.assert_close(model.forward_features(x).mean(0), features)
        of_mean = model.head(model.lif(features[None].mean((3, 4))).mean(0))
    assert not torch.allclose(of_mean, logits)


def test_heads_come_and_go():
    model, x = build().eval(), digits()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(7)  # keeps the pooling, which is none
    with refuses("global_pool"):
        model(x)
    model.reset_classifier(7, "avg")
    assert (model(x).shape, model.head.weight.dtype, model.head.training) == ((2, 7), torch.float64, False)
    assert build(num_classes=0)(x).shape == (2, 64)
    assert build(num_classes=0, global_pool="")(x).shape == (2, 64, 2, 3)


WEIGHTS = {
    "ours": ("qkformer_3_64", {}, lambda model: model.state_dict()),
    "released": ("qkformer_3_64", {}, to_released),
    "maxformer": ("qkformer_10_384", {"residual": "ms", "width": 64, "heads": 2}, to_released),
    "compiled": (
        "qkformer_3_64",
        {},
        lambda model: {f"module._orig_mod.{key}": value for key, value in to_released(model).items()},
    ),
    "lightning": ("qkformer_3_64", {}, lambda model: {f"model.{key}": v for key, v in model.state_dict().items()}),
}


@pytest.fixture(params=WEIGHTS)
def saved(request, tmp_path):
    """Return a network's name and arguments, its state dict, and a file with it in one naming."""
    name, arguments, spell = WEIGHTS[request.param]
    arguments = {"in_chans": 3, "num_classes": 5, **arguments}
    model = timm.create_model(name, **arguments)
    torch.save({"state_dict": spell(model)}, tmp_path / "weights.pth")
    return name, arguments, model.state_dict(), tmp_path / "weights.pth"


def test_files_of_any_naming_load(saved):
    name, arguments, weights, path = saved
    overlay = {"file": str(path), "num_classes": 5, "input_size": (3, 8, 8)}
    for more in ({"checkpoint_path": path}, {"pretrained": True, "pretrained_cfg_overlay": overlay}):
        loaded = timm.create_model(name, **arguments, **more).state_dict()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("membrane", ["released", "per_sample"])
@pytest.mark.parametrize("naming", ["released", "ours"])
def test_released_weights_warn_of_another_membrane(naming, membrane, tmp_path, recwarn):
    """Expect no warning of `load_released`, because the engine sets the membrane."""
    warnings.simplefilter("always")
    model, path = timm.create_model("qkformer_3_64"), tmp_path / "weights.pth"
    weights = WEIGHTS[naming][2](model)
    torch.save(weights, path)
    load_released(model, weights)
    assert not recwarn
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    for more in ({"checkpoint_path": path}, overlay, overlay | {"features_only": True}):
        timm.create_model("qkformer_3_64", ssa_membrane=membrane, **more)
    lines = [str(warning.message) for warning in recwarn]
    assert len(lines) == 3 * (membrane == "per_sample" and naming == "released")
    assert all('ssa_membrane="released"' in line and "\n" not in line for line in lines)


def test_head_and_first_convolution_adapt_as_timm_does(saved):
    name, arguments, weights, path = saved
    overlay = {"file": str(path), "num_classes": 5, "input_size": (3, 8, 8)}
    arguments |= {"in_chans": 1, "num_classes": 2}
    loaded = timm.create_model(name, **arguments, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    first = "stages.0.embed.units.0.conv.weight"
    torch.testing.assert_close(loaded[first], weights[first].sum(1, keepdim=True))
    assert loaded["head.weight"].shape[0] == 2
    assert all(torch.equal(loaded[key], weights[key]) for key in weights if key != first and "head" not in key)


@pytest.mark.parametrize("more", [{"features_only": True}, {"pretrained_strict": False}])
def test_files_that_lack_the_stages_are_noticed(more, tmp_path):
    """Notice missing weights, because timm loads non-strictly and logs below its default level."""
    weights, path = timm.create_model("qkformer_3_64").state_dict(), tmp_path / "weights.pth"
    arguments = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, **more}
    torch.save({f"backbone.{key}": value for key, value in weights.items()}, path)
    with refuses("stages.0.embed.units.0.conv.weight"):
        timm.create_model("qkformer_3_64", **arguments)
    torch.save({key: value for key, value in weights.items() if "stages.2" not in key}, path)
    with pytest.warns(UserWarning, match=re.escape("stages.2.embed.units.0.conv.weight")):
        timm.create_model("qkformer_3_64", **arguments)
    torch.save(weights, path)
    with warnings.catch_warnings(action="error"):
        timm.create_model("qkformer_3_64", neuron="plif", **arguments | {"pretrained_strict": False})


def test_mismatches_have_the_names_of_the_file():
    model = timm.create_model("qkformer_3_64")
    weights = {f"module.{key}": value for key, value in to_released(model).items()}
    del weights["module.stage1.0.tssa.q_bn.bias"]
    with refuses("stage1.0.tssa.q_bn.bias") as error:
        load_released(model, weights)
    assert "stages." not in str(error.value)
    assert model.load_state_dict(weights, strict=False).missing_keys == ["stages.0.blocks.0.attn.q.bn.bias"]


def test_the_graph_of_torch_fx_computes_the_same():
    model = build()
    leaves = {"leaf_modules": [models.LIF]}
    graph = create_feature_extractor(model, ["stages.1.blocks.0.add_1", "head"], tracer_kwargs=leaves)
    x = digits(3)
    with torch.no_grad():
        block, logits = graph(x).values()
        torch.testing.assert_close(logits, model(x))
        torch.testing.assert_close(block.mean(0), model.forward_intermediates(x)[1][1])
    with pytest.raises(TypeError, match="leaf_modules"):
        create_feature_extractor(model, ["head"])
