"""Writes adamw.safetensors: eight AdamW steps of PyTorch on a toy, with the reference's parameter groups.

    OMP_NUM_THREADS=1 python golden/adamw.py

Parameters of every rank that the groups treat differently (matrix, bias, vector, queries, temperature), gradients that
span many orders of magnitude, a learning rate that changes every step, and clipping by the global norm.
"""

import os

import torch
from safetensors.torch import save_file

SHAPES = {"layer.weight": (5, 7), "layer.bias": (5,), "norm.weight": (7,), "query_tokens": (1, 3, 7), "temp": ()}
STEPS, CLIP = 8, 1.5


def main() -> None:
    torch.manual_seed(11)
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    out = {f"start.{name}": p.detach().clone() for name, p in params.items()}
    decays = {name: p.dim() != 1 and not name.endswith(".bias") for name, p in params.items()}
    groups = [
        {"params": [p for name, p in params.items() if decays[name]], "weight_decay": 0.05},
        {"params": [p for name, p in params.items() if not decays[name]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-8)
    norms, rates = [], []
    for step in range(STEPS):
        rate = 1e-2 * (step + 1) / STEPS
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in params.items():
            p.grad = torch.randn(p.shape) * 10.0 ** torch.randint(-4, 1, p.shape)
            out[f"grad.{step}.{name}"] = p.grad.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(list(params.values()), CLIP).item())
        rates.append(rate)
        optimizer.step()
        for name, p in params.items():
            out[f"after.{step}.{name}"] = p.detach().clone()
    out["norms"] = torch.tensor(norms)
    out["rates"] = torch.tensor(rates, dtype=torch.float64)
    for name, p in params.items():
        out[f"m.{name}"] = optimizer.state[p]["exp_avg"].clone()
        out[f"v.{name}"] = optimizer.state[p]["exp_avg_sq"].clone()
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "adamw.safetensors")
    save_file(out, path, metadata={"script": "golden/adamw.py", "torch": torch.__version__, "seed": "11"})


if __name__ == "__main__":
    main()
