"""spikingjelly 2.0.0's `qkformer_10_384`, timed in a separate process.

This project needs spikingjelly 0.0.0.0.14. Install the other version in a folder:

    pip install --no-deps --target FOLDER spikingjelly==2.0.0 loguru h5py SciencePlots

The network has the released network's size but differs: other convolutions have biases, half of the neurons do not
detach the reset, and its self-attention has one convolution for q, k and v.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from engine.config import Config

from .common import ROOT, choose, random_batch, recipe, release
from .turns import STEPS, Timed, reason


class Remote:
    """Side in a separate process that waits for its turns; `turn` and `peak_bytes` are those of `Timed`.

    Args:
        folder: installation of spikingjelly 2, which comes first on the path of the process.
        settings: `model` and `changes` of its recipe for the batch, `mode`, `amp`, `device` and `precision`. The
            precision policy stores the neurons in half precision and runs them on Triton. Without it, plain autocast
            takes a Python loop for any type but float32.

    Raises:
        ValueError: the network does not run on this machine.
    """

    def __init__(self, folder: Path | None, settings: dict):
        if folder is None or not (folder / "spikingjelly").is_dir():
            raise ValueError(f"--spikingjelly2 {folder}: holds no folder spikingjelly; install it there")
        paths = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(settings)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LOGURU_LEVEL": "ERROR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.peak_bytes = self._answer()["peak_bytes"]
        except ValueError:
            self.close()
            raise

    def turn(self, steps: int) -> float:
        """Return the mean time of a step (ms)."""
        print(steps, file=self._process.stdin, flush=True)
        return self._answer()["ms"]

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.kill()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with code {self._process.wait()}"}
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer


def build(cfg: Config, precision: bool, amp: str, device: torch.device) -> nn.Module:
    """Create the network on `device`, with a reset before each call; `precision` applies its policy."""
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.model.qkformer import qkformer_10_384

    model = qkformer_10_384(T=cfg.time_steps, in_channels=cfg.in_channels, num_classes=cfg.num_classes).to(device)
    if precision:
        from spikingjelly.activation_based.precision import prepare_model_for_precision

        kind = "fp32" if amp == "off" else amp
        model = prepare_model_for_precision(model, device, {"mode": kind, "neuron_storage": kind}).model
    model.register_forward_pre_hook(lambda *_: functional.reset_net(model))
    return model


def main() -> None:
    """Print one JSON line for the start, and one for each number of steps on standard input."""
    answers, sys.stdout = sys.stdout, sys.stderr  # keeps the library's output out of the answers

    def answer(**content) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        settings = json.loads(sys.argv[1])
        cfg, device = recipe(settings["model"], **settings["changes"]), choose(settings["device"])
        step, amp = STEPS[settings["mode"]], settings["amp"]
        make = lambda: step(build(cfg, settings["precision"], amp, device), amp, device)  # noqa: E731
        timed = Timed(make, random_batch(cfg, device), device)
        release(device)
        answer(peak_bytes=timed.peak_bytes)
        for line in sys.stdin:
            answer(ms=timed.turn(int(line)))
            release(device)
    except Exception as error:  # the parent reports it
        answer(error=reason(error))


if __name__ == "__main__":
    main()
