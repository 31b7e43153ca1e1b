"""A training step, both stages, here and in PyTorch: the same weights, batch and threads, in one run.

    cargo build --release -p blip2-train --example bench_step
    python benches/train_step.py [--threads 2] [--steps 4] [--rounds 2] [--precision f32|bf16] [--shape mini|base]

needs torch, numpy and safetensors (golden/requirements.txt). The two programs take turns, each stage in a process of its own, as in
training, each side with its own allocator and torch with its own defaults; what counts is the median of each. Before that both losses,
without dropout, must agree. bf16: mixed precision in both, in PyTorch by autocast. base: the published Q-Former behind CLIP ViT-L, 8
pictures, in front of OPT-350m.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

HEADS, DEC = 12, 30522
LLM_HEADS, LLM_KV_HEADS, LLM_DEPTH, ROPE_BASE = 9, 3, 30, 100000.0
OPT_HEADS, OPT_DEPTH = 16, 24


class Weights:
    """Parameters by name; all get gradients but the language model's."""

    def __init__(self, tensors):
        own = {n: t for n, t in tensors.items() if not n.startswith("batch.")}
        self.all = {n: t.clone().requires_grad_(not n.startswith("model.")) for n, t in own.items()}

    def linear(self, x, name):
        return F.linear(x, self.all[name + ".weight"], self.all.get(name + ".bias"))

    def norm(self, x, name, eps=1e-12):
        return F.layer_norm(x, x.shape[-1:], self.all[name + ".weight"], self.all[name + ".bias"], eps)

    def trained(self):
        return [t for t in self.all.values() if t.requires_grad]


class QFormer:
    def __init__(self, weights, dropout):
        self.w, self.p = weights, dropout
        self.queries = weights.all["query_tokens"].shape[1]
        self.depth = sum(name.endswith(".self_attn.q.weight") for name in weights.all if name.startswith("qformer."))

    def drop(self, x):
        return F.dropout(x, self.p) if self.p else x

    def heads(self, x):
        b, t, width = x.shape
        return x.view(b, t, HEADS, width // HEADS).transpose(1, 2)

    def attend(self, x, k, v, name, mask):
        q = self.heads(self.w.linear(x, name + ".q"))
        y = F.scaled_dot_product_attention(q, self.heads(k), self.heads(v), mask, dropout_p=self.p)
        b, h, t, d = y.shape
        y = self.drop(self.w.linear(y.transpose(1, 2).reshape(b, t, h * d), name + ".out"))
        return self.w.norm(x + y, name + "_norm")

    def feed_forward(self, x, name):
        y = self.w.linear(F.gelu(self.w.linear(x, name + ".fc1")), name + ".fc2")
        return self.w.norm(x + self.drop(y), name + ".norm")

    def picture(self, patches):
        names = [f"qformer.layers.{i}.cross_attn" for i in range(0, self.depth, 2)]
        return {n: (self.w.linear(patches, n + ".k"), self.w.linear(patches, n + ".v")) for n in names}

    def enter(self, x):
        return self.drop(self.w.norm(x, "qformer.embed_norm"))

    def embed(self, ids):
        positions = self.w.all["qformer.position_embeddings.weight"][: ids.shape[1]]
        return F.embedding(ids, self.w.all["qformer.word_embeddings.weight"]) + positions

    def run(self, x, picture=None, queries=0, cache=None, keep=None, mask=None):
        """x holds `queries` queries, then text; `cache` are keys and values before it, `keep` collects them."""
        for i in range(self.depth):
            layer = f"qformer.layers.{i}."
            k, v = (self.w.linear(x, f"{layer}self_attn.{part}") for part in "kv")
            if keep is not None:
                keep.append((k, v))
            if cache is not None:
                k, v = (torch.cat(pair, 1) for pair in zip(cache[i], (k, v)))
            x = self.attend(x, k, v, layer + "self_attn", mask)
            parts = []
            if queries:
                q = x[:, :queries]
                if layer + "cross_attn" in picture:
                    q = self.attend(q, *picture[layer + "cross_attn"], layer + "cross_attn", None)
                parts.append(self.feed_forward(q, layer + "ffn_query"))
            if x.shape[1] > queries and not (queries and i + 1 == self.depth):
                parts.append(self.feed_forward(x[:, queries:], layer + "ffn_text"))
            x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return x


def stage1_loss(weights, patches, ids, dropout):
    former, w = QFormer(weights, dropout), weights
    b, t = ids.shape
    picture = former.picture(w.norm(patches, "ln_vision", 1e-5))
    tokens = w.all["query_tokens"].expand(b, -1, -1)
    keep = []
    queries = former.run(former.enter(tokens), picture, former.queries, keep=keep)
    text = former.run(former.enter(former.embed(ids)))
    image = F.normalize(w.linear(queries, "vision_proj"), dim=-1)
    text = F.normalize(w.linear(text[:, 0], "text_proj"), dim=-1)
    sim = torch.einsum("aqe,be->abq", image, text).max(-1).values / w.all["temp"]
    own = torch.arange(b)
    itc = (F.cross_entropy(sim, own, label_smoothing=0.1) + F.cross_entropy(sim.T, own, label_smoothing=0.1)) / 2

    other = (own + 1) % b
    pictures, texts = torch.cat([own, other, own]), torch.cat([own, own, other])
    joined = torch.cat([w.all["query_tokens"].expand(3 * b, -1, -1), former.embed(ids[texts])], 1)
    rows = {n: (k[pictures], v[pictures]) for n, (k, v) in picture.items()}
    out = former.run(former.enter(joined), rows, former.queries)
    itm = F.cross_entropy(w.linear(out, "itm_head").mean(1), (torch.arange(3 * b) < b).long())

    start = ids.clone()
    start[:, 0] = DEC
    causal = torch.cat([torch.ones(t, former.queries), torch.ones(t, t).tril()], 1).bool()
    hidden = former.run(former.enter(former.embed(start)), cache=keep, mask=causal)[:, :-1]
    hidden = w.norm(F.gelu(w.linear(hidden, "qformer.lm_head.dense")), "qformer.lm_head.norm")
    logits = F.linear(hidden, w.all["qformer.word_embeddings.weight"], w.all["qformer.lm_head.bias"])
    itg = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    return itc + itm + itg


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def llama(w, x):
    b, t, width = x.shape
    d = width // LLM_HEADS
    angles = torch.outer(torch.arange(t).float(), ROPE_BASE ** (-torch.arange(0, d, 2) / d))
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    for i in range(LLM_DEPTH):
        layer = f"model.layers.{i}."
        y = rms_norm(x, w.all[layer + "input_layernorm.weight"])
        q, k, v = (w.linear(y, f"{layer}self_attn.{n}_proj").view(b, t, -1, d).transpose(1, 2) for n in "qkv")
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (z.repeat_interleave(LLM_HEADS // LLM_KV_HEADS, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        x = x + w.linear(y, layer + "self_attn.o_proj")
        y = rms_norm(x, w.all[layer + "post_attention_layernorm.weight"])
        y = F.silu(w.linear(y, layer + "mlp.gate_proj")) * w.linear(y, layer + "mlp.up_proj")
        x = x + w.linear(y, layer + "mlp.down_proj")
    return rms_norm(x, w.all["model.norm.weight"])


def opt(w, x):
    """OPT-350m's blocks, their norms behind the branches; x already as wide as they are."""
    b, t, width = x.shape
    x = x + w.all["model.decoder.embed_positions.weight"][2 : t + 2]
    norm = lambda x, name: F.layer_norm(x, (width,), w.all[name + ".weight"], w.all[name + ".bias"], 1e-5)
    for i in range(OPT_DEPTH):
        layer = f"model.decoder.layers.{i}."
        q, k, v = (w.linear(x, f"{layer}self_attn.{n}_proj").view(b, t, OPT_HEADS, -1).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        x = norm(x + w.linear(y, layer + "self_attn.out_proj"), layer + "self_attn_layer_norm")
        x = norm(x + w.linear(F.relu(w.linear(x, layer + "fc1")), layer + "fc2"), layer + "final_layer_norm")
    return x


def stage2_loss(weights, patches, ids, dropout):
    former, w = QFormer(weights, dropout), weights
    picture = former.picture(w.norm(patches, "ln_vision", 1e-5))
    queries = w.all["query_tokens"].expand(len(ids), -1, -1)
    soft = w.linear(former.run(former.enter(queries), picture, former.queries), "llm_proj")
    if "model.embed_tokens.weight" in w.all:
        words = w.all["model.embed_tokens.weight"]
        hidden = llama(w, torch.cat([soft, F.embedding(ids, words)], 1))[:, former.queries - 1 : -1]
    else:
        words = w.all["model.decoder.embed_tokens.weight"]
        hidden = opt(w, torch.cat([soft, w.linear(F.embedding(ids, words), "model.decoder.project_in")], 1))
        hidden = w.linear(hidden[:, former.queries - 1 : -1], "model.decoder.project_out")
    return F.cross_entropy(F.linear(hidden, words).flatten(0, 1), ids.flatten())


# Steps that don't count: memory that a process takes for the first time is cleared by the kernel. Also in bench_step.rs.
WARM_UP = 3


def take_steps(weights, loss, batch, steps, precision):
    """Loss without dropout, and seconds of whole steps with it."""
    mixed = lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), mixed():
        value = loss(weights, *batch, 0.0).item()
    params = weights.trained()
    adamw = torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.98), weight_decay=0.05)
    seconds = []
    for step in range(WARM_UP + steps):
        begin = time.perf_counter()
        adamw.zero_grad()
        with mixed():
            value_of_step = loss(weights, *batch, 0.1)
        value_of_step.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adamw.step()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - begin)
    return {"loss": value, "seconds": seconds}


def pytorch(stage, path, steps, precision, threads):
    torch.set_num_threads(threads)
    tensors = load_file(path)
    batch = tensors["batch.patches"], tensors["batch.ids"].long()
    return take_steps(Weights(tensors), {1: stage1_loss, 2: stage2_loss}[stage], batch, steps, precision)


def here(stage, path, args):
    # The last two are what `blip2 train` sets for itself.
    env = {**os.environ, "RAYON_NUM_THREADS": str(args.threads), "CANDLE_NUM_THREADS": "1", "MIMALLOC_PURGE_DELAY": "30000"}
    command = [args.program, str(stage), path, str(args.steps), args.precision, args.shape]
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)


def there(stage, path, args):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(pytorch, stage, path, args.steps, args.precision, args.threads).result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="target/release/examples/bench_step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--shape", choices=["mini", "base"], default="mini")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds of {args.steps} steps, {args.precision}, {args.shape}")
    for stage in (1, 2):
        ours, theirs = [], []
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "step.safetensors")
            for _ in range(args.rounds):
                ours.append(here(stage, path, args))
                theirs.append(there(stage, path, args))
        a, b = ours[0]["loss"], theirs[0]["loss"]
        assert abs(a - b) < (1e-3 if args.precision == "f32" else 1e-2) * abs(b), f"stage {stage}: losses differ: {a} here, {b} in PyTorch"
        mine, other = (statistics.median(s for r in rs for s in r["seconds"]) for rs in (ours, theirs))
        print(f"stage {stage}: loss {a:.5f} and {b:.5f}; {mine:.3f} s here, {other:.3f} s in PyTorch: {mine / other:.2f} of its time", flush=True)


if __name__ == "__main__":
    main()
