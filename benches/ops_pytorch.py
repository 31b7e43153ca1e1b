"""The same operations as crates/blip2-ops/examples/bench_ops.rs, in PyTorch, on two threads.

Run: python benches/ops_pytorch.py      (prints NAME MILLISECONDS, the best of several runs)
"""

import os
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
torch.manual_seed(0)


def best(name, step, seconds=1.5):
    step()
    step()
    times, end, cpu = [], time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / len(times)
    times.sort()
    best, median, cpu = (1e3 * t for t in (times[0], times[len(times) // 2], cpu))
    print(f"{name:32} best {best:8.3f} ms   median {median:8.3f}   cpu {cpu:8.3f}", flush=True)


def train(name, inputs, fn):
    inputs = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        dy = torch.randn_like(fn(*inputs))
        best(name + " fwd", lambda: fn(*inputs))

    def step():
        for x in inputs:
            x.grad = None
        fn(*inputs).backward(dy)

    best(name + " fwd+bwd", step)


r = torch.randn
train("linear 1024x384x1536", [r(1024, 384), r(1536, 384), r(1536)], F.linear)
train("linear 1536x384x384", [r(1536, 384), r(384, 384), r(384)], F.linear)


def attention(q, k, v):
    q, k, v = (x.view(32, 48, 12, 32).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(32, 48, 384)


train("attention 32x48x12x32", [r(32, 48, 384) for _ in range(3)], attention)
train("layer_norm 1536x384", [r(1536, 384), r(384), r(384)], lambda x, w, b: F.layer_norm(x, (384,), w, b))
train("gelu 1536x1536", [r(1536, 1536)], F.gelu)
train("dropout 1536x384", [r(1536, 384)], lambda x: F.dropout(x, 0.1))
t = torch.randint(0, 30523, (512,))
train("ce 512x30523", [r(512, 30523)], lambda x: F.cross_entropy(x, t, label_smoothing=0.1))
p = r(30523, 384).requires_grad_()
opt = torch.optim.AdamW([p], lr=1e-4, weight_decay=0.05, fused=True)
p.grad = r(30523, 384)
best("adamw 11.7M (fused)", opt.step)
w = r(1536, 576)
with torch.no_grad():
    for n in (1, 5, 64, 1024):
        x = r(n, 576)
        best(f"f32 {n}x576x1536", lambda: F.linear(x, w))
