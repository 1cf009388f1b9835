"""spikingjelly 2.0.0's `qkformer_10_384`, timed in a process of its own.

This project needs spikingjelly 0.0.0.0.14, and one environment holds one of them. The other is put in a folder by

    pip install --no-deps --target FOLDER spikingjelly==2.0.0 loguru h5py SciencePlots

which comes first on the path of the process that `Remote` starts; it waits for its turns among the other sides.

The network is of the size of the released one but not the same: other convolutions have biases, half of its neurons do
not detach the reset, and its self-attention has one convolution for q, k and v.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import Config, load

from .common import ROOT, STEPS, Timed, choose, installed, random_batch, reason, release


class Remote:
    """The side in its process; `turn` and `peak_bytes` are those of `common.Timed`.

    Args:
        folder: where spikingjelly 2 is installed.
        recipe, flags: what its batch is made from.
        settings: `mode`, `amp` and `device` as everywhere; `precision` is whether its precision policy stores the
            neurons in the type of the mixed precision and runs them on Triton. Without it they run under plain
            autocast, where it takes a reference loop in Python for any type but float32.

    Raises:
        ValueError: it does not run here; the message says why.
    """

    def __init__(self, folder: Path, recipe: Path, flags: Sequence[str], settings: dict):
        if not (folder / "spikingjelly").is_dir():
            raise ValueError(f"--spikingjelly2 {folder}: there is no folder spikingjelly in it")
        paths = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps({"recipe": str(recipe), "flags": list(flags), **settings})],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LOGURU_LEVEL": "ERROR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            ready = self._answer()
        except ValueError:
            self.close()
            raise
        self.peak_bytes, self.version = ready["peak_bytes"], ready["version"]

    def turn(self, steps: int) -> float:
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


class FromRest(nn.Module):
    """A network of spikingjelly, reset before each call as it asks for."""

    def __init__(self, model: nn.Module):
        from spikingjelly.activation_based import functional

        super().__init__()
        self.model, self._reset = model, functional.reset_net

    def forward(self, x: Tensor) -> Tensor:
        self._reset(self.model)
        return self.model(x)


def build(cfg: Config, precision: bool, amp: str, device: torch.device) -> nn.Module:
    """The network on `device`; with `precision` under its precision policy."""
    from spikingjelly.activation_based.model.qkformer import qkformer_10_384

    model = qkformer_10_384(T=cfg.time_steps, in_channels=cfg.in_channels, num_classes=cfg.num_classes).to(device)
    if precision:
        from spikingjelly.activation_based.precision import prepare_model_for_precision

        kind = "fp32" if amp == "off" else amp
        model = prepare_model_for_precision(model, device, {"mode": kind, "neuron_storage": kind}).model
    return FromRest(model)


def main() -> None:
    told, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed does not get between the answers

    def tell(**answer) -> None:
        print(json.dumps(answer), file=told, flush=True)

    try:
        settings = json.loads(sys.argv[1])
        cfg, device, amp = load(settings["recipe"], settings["flags"]), choose(settings["device"]), settings["amp"]
        make = STEPS[settings["mode"]]
        batch = random_batch(cfg, device)
        timed = Timed(lambda: make(build(cfg, settings["precision"], amp, device), amp, device), batch, device)
        release(device)
        tell(peak_bytes=timed.peak_bytes, version=installed("spikingjelly"))
        for line in sys.stdin:
            ms = timed.turn(int(line))
            release(device)
            tell(ms=ms)
    except Exception as error:  # whatever it is, it is the answer
        tell(error=reason(error))


if __name__ == "__main__":
    main()
