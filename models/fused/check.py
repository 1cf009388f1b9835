"""Whether the kernels run on a device and give what the modules give: tried once on a small network."""

import torch

from ..neuron import LIF

FLIPS = 0.05  # relative deviation that a few spikes, decided by rounding, may make


def problem(device: str) -> str | None:
    """What is wrong on `device`, or None. Compiling the kernels takes some seconds, the first time."""
    from ..hst import create_model  # which imports this package

    results = {}
    with torch.random.fork_rng(), torch.enable_grad(), torch.autocast(device, enabled=False):
        torch.manual_seed(0)
        x = torch.randn(8, 1, 16, 16, device=device)
        state = create_model("qkformer_3_64", lif_backend="torch").state_dict()
        for backend in ("torch", "triton"):
            model = create_model("qkformer_3_64", lif_backend="torch").to(device).train()
            model.load_state_dict(state)
            for module in model.modules():
                if isinstance(module, LIF):
                    module.backend = backend  # `set_lif_backend` would ask this function
            logits = model(x)
            logits.square().sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            with torch.no_grad():
                results[backend] = logits.detach(), gradient, model.eval().half()(x.half()).float()
    parts = "logits", "gradients", "logits in half precision"
    for what, ours, theirs in zip(parts, results["triton"], results["torch"], strict=True):
        if not (ours - theirs).norm() <= FLIPS * theirs.norm():
            return f"gives other {what} than torch here"
    return None
