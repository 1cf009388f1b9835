"""scikit-learn's handwritten digits, as images and before a simulated event camera; they need no download.

The digits move along a circle, as the images of CIFAR10-DVS moved along a closed path on a monitor (Li et al.,
"CIFAR10-DVS: An Event-Stream Dataset for Object Classification", 2017). Shapes: B digits, S side of the sensor.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .aedat import Events
from .frames import Layout, to_frames

SIDE = 32  # pixels of the sensor, in height and in width
DIGIT = 20  # pixels of a digit on it
RADIUS = 4  # pixels of the circle
STEPS = 48  # looks at the scene in one turn
DARK = 0.1  # added to the intensities 0 to 1: the light of the dark room
THRESHOLD = 0.2  # change of the log intensity that makes an event


class Digits(Dataset):
    """1,797 digits, 8x8 grey; 360 of them, a fifth of each class drawn with a fixed seed, are for testing."""

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits  # a second to import, and no other data set needs it
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
        images, labels = parts[0::2] if train else parts[1::2]
        self.images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # 0..16 to 0..255
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def create_frames(train: bool, layout: Layout) -> list[tuple[np.ndarray, int]]:
    """Return the digits before the simulated camera: ([T,2,S,S] unsigned, label)."""
    digits = Digits(train)
    frames = [to_frames(events, layout) for events in record(digits.images, seed=0 if train else 1)]
    return list(zip(frames, digits.labels, strict=True))


def record(images: np.ndarray, seed: int) -> list[Events]:
    """Record each image [B,8,8] uint8 as it moves round the circle once, from a random point."""
    scene = torch.from_numpy(images)[:, None].float() / 255  # [B,1,8,8]
    scene = F.interpolate(scene, (DIGIT, DIGIT), mode="bilinear")
    scene = F.pad(scene, [(SIDE - DIGIT) // 2] * 4)  # [B,1,S,S]
    start = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) * 2 * math.pi
    seen = _log_intensity(scene, start)  # [B,S,S], at the last event of each pixel
    changes = []
    for step in range(1, STEPS + 1):
        change = (_log_intensity(scene, start + 2 * math.pi * step / STEPS) - seen) / THRESHOLD
        change = change.trunc()
        seen += change * THRESHOLD
        changes.append(change.to(torch.int8))
    return [_events(sample.numpy()) for sample in torch.stack(changes, 1)]


def _log_intensity(scene: Tensor, angle: Tensor) -> Tensor:
    """Return the log intensity on the sensor, [B,S,S], with the scene at each `angle` [B] (radians) of the circle."""
    shift = torch.stack([angle.cos(), angle.sin()], 1) * (2 * RADIUS / SIDE)  # [B,2], x and y
    matrices = torch.cat([torch.eye(2).expand(len(scene), 2, 2), -shift[:, :, None]], 2)  # [B,2,3]
    grid = F.affine_grid(matrices, scene.shape, align_corners=False)
    return torch.log(F.grid_sample(scene, grid, align_corners=False)[:, 0] + DARK)


def _events(changes: np.ndarray) -> Events:
    """Return the events of changes [STEPS,S,S] in thresholds: one per threshold, ON if the change is positive."""
    t, y, x = changes.nonzero()
    values = changes[t, y, x]
    return Events(*(np.repeat(column, np.abs(values)) for column in (t, x, y, (values > 0).astype(np.int64))))
