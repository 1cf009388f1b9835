"""Released names to this project's and back, strictly."""

import pytest
import torch
from golden_cases import MODELS, RIVALS, load_case, make_weights
from scripts import refuses

from models import create_model
from models.registry import identify
from models.released import load_released, released_key_map, to_released


@pytest.mark.parametrize("name", MODELS | RIVALS)
def test_weights_of_every_released_network_are_recognised_loaded_and_written(name):
    case, (variant, arguments) = load_case(name), (MODELS | RIVALS)[name]
    weights = make_weights(case.about["state_dict"], case.seed)
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    identified, shown = identify(prefixed)
    assert (identified, shown.get("residual", "sew")) == (variant, arguments.get("residual", "sew"))
    model = create_model(variant, **arguments).double()
    create_model(identified, **shown).load_state_dict(model.state_dict())
    assert identify(model.state_dict())[0] == variant or name in RIVALS  # rivals share this project's names
    load_released(model, prefixed)
    written, read = to_released(model), released_key_map(model)
    assert {key: list(value.shape) for key, value in written.items()} == case.about["state_dict"]
    assert all(torch.equal(written[key], weights[key]) for key in read)
    assert len(read) == len(weights) or name in RIVALS  # their code never reads some
    assert sum(p.numel() for p in model.parameters()) == case.about.get("params_used", case.about.get("params"))


def test_any_spelling_is_accepted():
    model = create_model("qkformer_4_384")
    respelled = {
        key.replace(".mlp1_", ".fc1_").replace(".mlp2_", ".fc2_").replace(".ssa.", ".attn."): value + 1
        for key, value in to_released(model).items()
    }
    load_released(model, respelled)
    weight = model.state_dict()["stages.2.blocks.1.attn.v.conv.weight"]
    assert torch.equal(weight, respelled["stage3.1.attn.v_conv.weight"])


@pytest.mark.parametrize(
    "name", ["cifar10_T4_B3_32_s0", "dvs128-gesture_T6_B2_128_s0", "ms_qkformer_10_384_T2_B2_224_s0"]
)
def test_problems_are_all_listed_and_nothing_is_loaded(name):
    model = create_model(MODELS[name][0], **MODELS[name][1])
    broken = make_weights(load_case(name).about["state_dict"], seed=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del broken["head.bias"], broken["stage1.0.attn.q_bn.bias" if model.residual == "ms" else "stage1.0.tssa.q_bn.bias"]
    broken["patch_embed9.proj_conv.weight"] = broken["stage1.9.junk"] = torch.zeros(1)
    broken["head.weight"] = torch.zeros(3, 5)
    with refuses("stage1.0.", "head.bias", "patch_embed9.proj_conv.weight", "stage1.9.junk", "head.weight", "(3, 5)"):
        load_released(model, broken)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_membrane_shortcuts_are_not_mistaken_for_spiking_ones():
    """Identify two networks of equal shapes by their names."""
    sew, ms = create_model("qkformer_10_384"), create_model("qkformer_10_384", residual="ms")
    for model, weights in ((sew, to_released(ms)), (ms, to_released(sew))):
        with refuses():
            load_released(model, weights)


def test_what_was_never_released_has_no_names():
    with refuses("channel"):
        to_released(create_model("qkformer_2_256", attention=("channel", "self")))
    model = create_model("qkformer_2_64")
    model.attention = ("pair", "self")  # as with an attention of the user
    with refuses("pair"):
        to_released(model)
    with refuses("'cifar'"):
        released_key_map(create_model("qkformer_4_384", residual="ms"))


def test_foreign_weights_are_not_recognised():
    weights = to_released(create_model("qkformer_3_64"))
    flat = {key: value.flatten() if "conv" in key else value for key, value in weights.items()}
    for state in (
        {},
        {"head.weight": torch.zeros(())},
        weights | {"head.weight": torch.zeros(10, 48)},
        weights | {"another": torch.zeros(1)},
        weights | {"stage2.0.mlp.mlp1_conv.weight": torch.zeros(7, 32, 1, 1)},
        flat,
    ):
        with refuses("qkformer_10_384"):
            identify(state)
