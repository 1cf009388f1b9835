"""Augmentation of event frames on the device, with the operations and magnitudes of the released DVS training.

Spikformer has the same, after Li et al., "Neuromorphic Data Augmentation for Training Spiking Neural Networks", 2022.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import RandomErasing

OPERATIONS = ("identity", "shear_x", "translate_x", "translate_y", "rotate", "cutout")
MOST = {"shear_x": 0.3, "translate_x": 5.0, "translate_y": 5.0, "rotate": 30.0}  # radians, pixels, pixels, degrees
STEPS = 31  # magnitudes, evenly from -MOST to MOST: the released code flips the sign of half, which changes nothing
MAGNITUDES = {name: torch.linspace(-MOST.get(name, 0), MOST.get(name, 0), STEPS).tolist() for name in OPERATIONS}
CUTOUT_AREA = (0.001, 0.11)  # of the frame, a square


class SNNWideAugment:
    """Transform of frames [B,T,C,H,W]: a flip of each sample with probability `hflip`, then, if `wide`, one operation.

    All frames of a sample change alike. Random numbers come from torch's generator of the CPU.
    """

    def __init__(self, hflip: float, wide: bool):
        self.hflip, self.wide = hflip, wide

    def __call__(self, frames: Tensor) -> Tensor:
        flips = (torch.rand(len(frames)) < self.hflip).tolist()
        chosen = torch.randint(len(OPERATIONS), (len(frames),)).tolist() if self.wide else [0] * len(frames)
        operations = [OPERATIONS[i] for i in chosen]
        steps = torch.randint(STEPS, (len(frames),)).tolist()
        magnitudes = [MAGNITUDES[operation][step] for operation, step in zip(operations, steps, strict=True)]
        side = frames.shape[-2:]
        matrices = [sampling(*sample, *side) for sample in zip(operations, magnitudes, flips, strict=True)]
        frames = _move(frames, torch.tensor(matrices))
        for sample, operation in zip(frames, operations, strict=True):
            if operation == "cutout":
                top, left, height, width, _ = RandomErasing.get_params(sample, CUTOUT_AREA, (1, 1), [0.0])
                sample[..., top : top + height, left : left + width] = 0
        return frames


def sampling(operation: str, magnitude: float, flip: bool, height: int, width: int) -> list[list[float]]:
    """Return the 2x3 matrix of `affine_grid` from the pixels of the result to their sources; signs as in torchvision.

    `magnitude` is a shear in radians, a shift in pixels (rounded towards 0) or an angle in degrees; a flip comes first.
    """
    cos, sin = math.cos(math.radians(magnitude)), math.sin(math.radians(magnitude))
    of_column, of_row = {
        "shear_x": ([1.0, math.tan(magnitude) * height / width, 0.0], [0.0, 1.0, 0.0]),
        "translate_x": ([1.0, 0.0, -2 * int(magnitude) / width], [0.0, 1.0, 0.0]),
        "translate_y": ([1.0, 0.0, 0.0], [0.0, 1.0, -2 * int(magnitude) / height]),
        "rotate": ([cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]),
    }.get(operation, ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]))
    return [[-value for value in of_column] if flip else of_column, of_row]


def _move(frames: Tensor, matrices: Tensor) -> Tensor:
    flat = frames.flatten(1, 2)  # [B,T*C,H,W]
    matrices = matrices.to(flat, non_blocking=True)  # without it the process waits for the GPU
    grid = F.affine_grid(matrices, flat.shape, align_corners=False)  # [B,H,W,2]
    return F.grid_sample(flat, grid, mode="nearest", align_corners=False).view_as(frames)
