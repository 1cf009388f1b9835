"""SNN wide augment: the effect and the frequency of each operation."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from engine.data import augment
from engine.data.augment import MOST, OPERATIONS, STEPS, SNNWideAugment, sampling


def moved(frames, operation, magnitude, flip=False):
    matrix = torch.tensor([sampling(operation, magnitude, flip, *frames.shape[-2:])])
    return augment._move(frames[None], matrix)[0]


def by_torchvision(frames, operation, magnitude):
    """Apply a released operation: nearest neighbours, zeros outside, about the centre; shifts by whole pixels."""
    plain = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    if operation == "shear_x":
        return TF.affine(frames, **plain | {"shear": [math.degrees(magnitude), 0.0]})
    if operation == "translate_x":
        return TF.affine(frames, **plain | {"translate": [int(magnitude), 0]})
    if operation == "translate_y":
        return TF.affine(frames, **plain | {"translate": [0, int(magnitude)]})
    return TF.rotate(frames, magnitude) if operation == "rotate" else frames


@pytest.mark.parametrize("shape", [(128, 128), (32, 48)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_those_of_torchvision(operation, shape):
    frames = torch.poisson(torch.rand(3, 2, *shape, generator=torch.Generator().manual_seed(0)) * 5)
    for fraction in (-1, -0.6, 0.2, 1):
        for flip in (False, True):
            magnitude = fraction * MOST.get(operation, 0)
            expected = by_torchvision(TF.hflip(frames) if flip else frames, operation, magnitude)
            differing = (moved(frames, operation, magnitude, flip) != expected).float().mean().item()
            # half-way between two pixels the last bit decides which is nearest
            assert differing <= (0.002 if operation in ("shear_x", "rotate") else 0)


def assert_uniform(values, choices):
    """Assert that each choice has its expected frequency; fails by chance once in a million times."""
    counts, expected, freedom = Counter(values), len(values) / len(choices), len(choices) - 1
    assert set(counts) <= set(choices)
    chi2 = sum((counts[choice] - expected) ** 2 / expected for choice in choices)
    assert chi2 < freedom + 4.9 * math.sqrt(2 * freedom) + 16


def test_every_operation_magnitude_sign_and_flip_is_drawn_as_often_as_it_should(monkeypatch):
    drawn = []
    monkeypatch.setattr(augment, "sampling", lambda *arguments: drawn.append(arguments[:3]) or sampling(*arguments))
    monkeypatch.setattr(augment, "_move", lambda frames, matrices: frames)
    torch.manual_seed(0)
    for _ in range(10):
        SNNWideAugment(0.5, wide=True)(torch.ones(1000, 1, 1, 4, 4))
    operations, _, flips = zip(*drawn, strict=True)
    assert_uniform(operations, OPERATIONS)
    assert_uniform(flips, [False, True])
    for operation, most in (("shear_x", 0.3), ("translate_x", 5), ("translate_y", 5), ("rotate", 30)):
        magnitudes = [magnitude for name, magnitude, _ in drawn if name == operation]
        assert_uniform([round(magnitude / most * 15, 3) for magnitude in magnitudes], range(-15, 16))
        assert_uniform([magnitude > 0 for magnitude in magnitudes if magnitude], [False, True])
        assert_uniform([flip for name, _, flip in drawn if name == operation], [False, True])


def test_shifts_are_whole_pixels_towards_zero():
    line = torch.zeros(1, 1, 1, 33)
    line[..., 16] = 1
    magnitudes = augment.MAGNITUDES["translate_x"]
    assert len(magnitudes) == STEPS
    shifts = Counter(moved(line, "translate_x", magnitude).argmax().item() - 16 for magnitude in magnitudes)
    # torch.linspace(-5, 5, 31) misses 1 and 2 by a bit, in the released code too
    assert shifts == {0: 7} | {side * k: n for side in (-1, 1) for k, n in ((1, 3), (2, 2), (3, 3), (4, 3), (5, 1))}


def test_cutout_erases_a_square_of_all_frames(monkeypatch):
    monkeypatch.setattr(augment, "OPERATIONS", ("cutout",))
    torch.manual_seed(0)
    frames = SNNWideAugment(0, wide=True)(torch.ones(400, 2, 2, 128, 128))
    erased = (frames == 0).numpy()
    assert (erased == erased[:, :1, :1]).all()  # the same place in every frame and polarity
    sides, corners = [], []
    for square in erased[:, 0, 0]:
        rows, columns = square.any(1).nonzero()[0], square.any(0).nonzero()[0]
        assert square.sum() == len(rows) * len(columns)
        assert len(rows) == len(columns)
        sides.append(len(rows))
        corners.append((rows[0] / (128 - len(rows)), columns[0] / (128 - len(rows))))
    areas = np.array(sides) ** 2 / 128**2
    assert areas.min() >= 0.0009
    assert 0.1 < areas.max() <= 0.1105
    assert abs(areas.mean() - 0.0555) < 5 * 0.0315 / math.sqrt(400)  # of a uniform area
    assert np.abs(np.mean(corners, 0) - 0.5).max() < 5 * 0.29 / math.sqrt(400)  # of a uniform place


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu_and_nobody_waits_for_it():
    frames = torch.poisson(torch.rand(64, 4, 2, 128, 128) * 5)
    SNNWideAugment(0.5, wide=True)(frames.cuda())  # the first call waits
    results = []
    for x in (frames.clone(), frames.cuda()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.manual_seed(0)
            results.append(SNNWideAugment(0.5, wide=True)(x))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert (results[0] != results[1].cpu()).float().mean() < 0.002
