"""Classification of a recording frame by frame as it arrives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden_cases import assert_close, load_case
from scripts import refuses
from test_models import lively

from models import LIF, create_model


def make(**kwargs):
    torch.manual_seed(0)
    return lively(create_model("qkformer_2_64", **kwargs))


def frames(batch=3, steps=6, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.full((batch, steps, 2, size, size), 0.5, dtype=torch.float64), generator=generator)


def stream(model, x):
    state, logits = None, []
    for t in range(x.shape[1]):
        y, state = model.step(x[:, t], state)
        logits.append(y)
    return logits, state


@pytest.mark.parametrize(
    "kwargs", [{}, {"residual": "ms"}, {"ssa_membrane": "released"}, {"attention": ("channel",) * 2}]
)
def test_steps_equal_the_whole_sequence(kwargs):
    model, x = make(**kwargs), frames()
    logits, _ = stream(model, x)
    for t in (0, 2, 5):  # the answer so far is that of the frames so far
        assert torch.equal(logits[t], model(x[:, : t + 1]))
    assert not torch.equal(logits[0], logits[5])


def test_steps_give_the_golden_logits():
    case = load_case("dvs128-gesture_T6_B2_128_s0")
    logits, _ = stream(case.model("corrected").eval(), case.input())
    assert_close(logits[-1].numpy(), case.arrays["corrected.eval.logits"], case.name)


def test_a_step_changes_nothing_but_what_it_returns():
    model, x = make(), frames()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, state = model.step(x[:, 0])
    membranes, total = [v.clone() for v in state.membranes], state.total.clone()
    first, _ = model.step(x[:, 1], state)
    model(x)
    again, _ = model.step(x[:, 1], state)  # from the same state, the same answer
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(membranes, state.membranes, strict=True))
    assert torch.equal(total, state.total)
    assert len(membranes) == sum(isinstance(module, LIF) for module in model.modules())
    assert not any(tensor.grad_fn for tensor in (state.total, *state.membranes))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not first.requires_grad


def test_in_half_precision_the_answer_still_follows():
    """Sum more frames than bfloat16 could, whose sums stop growing after some hundreds."""
    model, x = make().float(), frames(batch=1, steps=1).float()
    state = None
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(400):
            _, state = model.step(x[:, 0], state)
        before = state
        for _ in range(8):
            _, state = model.step(x[:, 0], state)
    busy = before.total > 256
    assert busy.any()
    assert (state.total[busy] > before.total[busy]).all()


def test_threads_share_a_network():
    model, inputs = make(), [frames(batch=1, steps=8, seed=seed) for seed in range(4)]
    expected = [model(x) for x in inputs]
    with ThreadPoolExecutor() as threads:
        steps = [threads.submit(stream, model, x) for x in inputs]
        whole = [threads.submit(model, x) for x in inputs]
    assert all(torch.equal(future.result()[0][-1], y) for future, y in zip(steps, expected, strict=True))
    assert all(torch.equal(future.result(), y) for future, y in zip(whole, expected, strict=True))


def test_a_step_refuses_other_shapes_and_training():
    model, x = make(), frames()
    _, state = model.step(x[:, 0])
    with refuses(2, 3):
        model.step(x[:2, 1], state)
    with refuses("[B,2,H,W]"):
        model.step(x[:, 0, :1])
    with refuses("eval()"):
        model.train().step(x[:, 0])
