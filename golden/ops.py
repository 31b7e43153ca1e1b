"""Writes golden/ops.safetensors: each op of blip2-ops as PyTorch computes it, forward and gradients.

Run: OMP_NUM_THREADS=1 python golden/ops.py        (versions: golden/requirements.txt)

Names: CASE.in.ARG (input), CASE.y (output), CASE.dy (gradient of the output), CASE.d.ARG (gradient of
an input). Everything is computed in float64 and stored as float32, so that the file is the truth and
not another float32 program's rounding. Sizes are odd on purpose.
"""

import math
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.manual_seed(20)
out = {}


def case(name, inputs, fn, constants=()):
    leaves = {}
    for key, value in inputs.items():
        value = value.float()  # what the Rust side will see
        out[f"{name}.in.{key}"] = value.contiguous()
        leaves[key] = value.double()
        if key not in constants:
            leaves[key].requires_grad_()
    y = fn(**leaves)
    dy = torch.randn(y.shape).float()
    (y * dy.double()).sum().backward()
    out[f"{name}.y"] = y.detach().float().contiguous()
    out[f"{name}.dy"] = dy.contiguous()
    for key, leaf in leaves.items():
        if key not in constants:
            out[f"{name}.d.{key}"] = leaf.grad.float().contiguous()


r = torch.randn

case("linear", dict(x=r(3, 5, 19), weight=r(23, 19), bias=r(23)), F.linear)
case("layer_norm", dict(x=r(5, 3, 37) * 2 + 1, weight=r(37), bias=r(37)),
     lambda x, weight, bias: F.layer_norm(x, (37,), weight, bias, 1e-6))
case("rms_norm", dict(x=r(7, 37) * 3, weight=r(37)),
     lambda x, weight: F.rms_norm(x, (37,), weight, 1e-5))
case("l2_normalize", dict(x=r(7, 21)), lambda x: F.normalize(x, dim=-1))
case("gelu", dict(x=r(11, 31) * 3), F.gelu)
case("quick_gelu", dict(x=r(11, 31) * 3), lambda x: x * torch.sigmoid(1.702 * x))
case("silu_gate", dict(gate=r(5, 29) * 3, up=r(5, 29)), lambda gate, up: F.silu(gate) * up)


def heads(x, h):
    b, t, w = x.shape
    return x.view(b, t, h, w // h).transpose(1, 2)


def attend(h, kv, scale):
    def fn(q, k, v, bias):
        q, k, v = heads(q, h), heads(k, kv), heads(v, kv)
        k, v = (x.repeat_interleave(h // kv, 1) for x in (k, v))
        p = torch.softmax(q @ k.transpose(-1, -2) * scale + bias, -1)
        return (p @ v).transpose(1, 2).flatten(2)
    return fn


pad = torch.zeros(3, 1, 1, 9)
pad[1, ..., 7:] = -math.inf
case("attention_padding", dict(q=r(3, 7, 4 * 5), k=r(3, 9, 4 * 5), v=r(3, 9, 4 * 5), bias=pad),
     attend(4, 4, 5 ** -0.5), constants=("bias",))
causal = torch.full((7, 7), -math.inf).triu(1)
case("attention_grouped", dict(q=r(2, 7, 6 * 8), k=r(2, 7, 2 * 8), v=r(2, 7, 2 * 8), bias=causal),
     attend(6, 2, 8 ** -0.5), constants=("bias",))
case("attention_bias", dict(q=r(2, 5, 3 * 7), k=r(2, 33, 3 * 7), v=r(2, 33, 3 * 7), bias=r(1, 3, 5, 33)),
     attend(3, 3, 1.0), constants=("bias",))


def rope(x, positions, h, base, interleaved):
    d = x.shape[-1] // h
    angle = positions.double()[..., None, None] * base ** (-torch.arange(0, d, 2).double() / d)
    cos, sin = angle.cos(), angle.sin()
    x = x.view(*x.shape[:2], h, d)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return y.flatten(2)


positions = torch.tensor([[0, 1, 2, 3, 4], [3, 3, 5, 17, 40]])
for style in ("interleaved", "half_split"):
    case(f"rope_{style}", dict(x=r(2, 5, 3 * 6)),
         lambda x: rope(x, positions, 3, 10000.0, style == "interleaved"))

ids = torch.tensor([[3, 0, 3], [10, 3, 7]])
case("embedding", dict(table=r(11, 13)), lambda table: F.embedding(ids, table))

targets = torch.tensor([4, -100, 0, 36, 4, -100, 11])
for name, smoothing in (("cross_entropy", 0.0), ("cross_entropy_smooth", 0.1)):
    case(name, dict(logits=r(7, 37) * 4),
         lambda logits: F.cross_entropy(logits, targets, label_smoothing=smoothing))
case("soft_cross_entropy", dict(logits=r(5, 17) * 3, targets=torch.softmax(r(5, 17), -1)),
     lambda logits, targets: F.cross_entropy(logits, targets), constants=("targets",))

# Five AdamW steps with changing learning rates.
p = r(13, 7).double().requires_grad_()
out["adamw.start"] = p.detach().float().contiguous()
p.data = out["adamw.start"].double()
opt = torch.optim.AdamW([p], lr=0.0, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.05)
grads, steps = [], []
for i in range(5):
    g = r(13, 7).float()
    opt.param_groups[0]["lr"] = 1e-2 * (i + 1)
    p.grad = g.double()
    opt.step()
    grads.append(g)
    steps.append(p.detach().float().clone())
out["adamw.grads"], out["adamw.steps"] = torch.stack(grads), torch.stack(steps)

path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ops.safetensors")
save_file(out, path, metadata={"script": "golden/ops.py", "torch": torch.__version__, "seed": "20"})
print(path, os.path.getsize(path))
