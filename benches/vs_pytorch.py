"""Times a caption, part by part, in transformers on PyTorch and in this program, in turns: medians, ratios, tokens.

    python vs_pytorch.py --program ../target/release/blip2 --vit g --llm opt-2.7b --picture photo.jpg --weights f32 q8_0 q4_k

Makes a folder of random weights of the published shape (full_size.py) unless --folder names one that is there. Each side
runs alone in a process of its own, with the same threads, A B A B …; the folder is read by each as it is. PyTorch computes
in f32. Tokens of the whole caption must be equal where this program keeps f32 or the stored f16; with q8_0 and q4_k the
share of equal tokens is shown. Ends with 1 if equal ones differ.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

PARTS = ["decode + resize", "image encoder", "q-former", "prefill", "decode, a token", "whole caption"]


def torch_side(args):
    """What `blip2 bench --json` prints, of transformers."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    processor = AutoProcessor.from_pretrained(args.folder)
    model = Blip2ForConditionalGeneration.from_pretrained(args.folder, dtype=torch.float32).eval()
    loading = time.perf_counter() - start
    beams, tokens, batch = args.num_beams, args.max_new_tokens, args.batch_size
    language, t5 = model.language_model, model.config.text_config.model_type == "t5"

    def median(work):
        work()
        times = []
        for _ in range(args.repeat):
            begin = time.perf_counter()
            result = work()
            times.append(time.perf_counter() - begin)
        return statistics.median(times), result

    def read():
        one = lambda: processor.image_processor(Image.open(args.picture).convert("RGB"), return_tensors="pt").pixel_values
        return torch.cat([one() for _ in range(batch)])

    def search(embeds, count):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return language.generate(inputs_embeds=embeds, attention_mask=mask, num_beams=beams, do_sample=False,
                                 min_new_tokens=count, max_new_tokens=count)

    def bridge(features):
        queries = model.query_tokens.expand(batch, -1, -1)
        return model.language_projection(model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state)

    def whole():
        return model.generate(pixel_values=read(), num_beams=beams, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    with torch.no_grad():
        parts = {}
        parts["decode + resize"], pixels = median(read)
        parts["image encoder"], features = median(lambda: model.vision_model(pixels).last_hidden_state)
        parts["q-former"], soft = median(lambda: bridge(features))
        start_ids = torch.tensor([processor.tokenizer("").input_ids] * batch)
        embeds = torch.cat([soft, language.get_input_embeddings()(start_ids)], 1)
        parts["prefill"], _ = median(lambda: search(embeds, 1))
        everything, _ = median(lambda: search(embeds, tokens))
        parts["decode, a token"] = (everything - parts["prefill"]) / (tokens - 1)
        parts["whole caption"], out = median(whole)
        skip = 1 if t5 else model.config.num_query_tokens + 1
        captions = [row[skip:].tolist() for row in out]
    # Not the parent's rusage: a child begins with the peak of the process that started it.
    with open("/proc/self/status") as status:
        peak = int(re.search(r"VmHWM:\s+(\d+)", status.read())[1]) * 1024
    print(json.dumps({"loading_seconds": loading, "peak_bytes": peak, "parts": parts, "tokens": captions}))


def run(args, beams, *command):
    """The JSON that a side prints last."""
    command = [*command, "--num-beams", str(beams), "--max-new-tokens", str(args.max_new_tokens), "--batch-size", str(args.batch_size),
               "--repeat", str(args.repeat), "--threads", str(args.threads)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def measure_torch(args, beams):
    return run(args, beams, sys.executable, __file__, "--side", "torch", "--folder", args.folder, "--picture", args.picture)


def measure_blip2(args, beams, weights):
    found = run(args, beams, args.program, "bench", args.picture, "--model", args.folder, "--weights", weights, "--prompt", "",
                "--hf-pixels", "--json")
    parts = {part["part"]: part["seconds"] for part in found["parts"]}
    return {**found, "parts": parts, "tokens": [caption["tokens"] for caption in found["captions"]]}


def compare(args, beams):
    """One table; whether the tokens are equal where they must be."""
    sides = {"pytorch f32": [], **{f"blip2 {weights}": [] for weights in args.weights}}
    for _ in range(args.rounds):
        sides["pytorch f32"].append(measure_torch(args, beams))
        for weights in args.weights:
            sides[f"blip2 {weights}"].append(measure_blip2(args, beams, weights))
    theirs = sides["pytorch f32"]
    middle = lambda rounds, value: statistics.median(value(found) for found in rounds)
    print(f"\n{args.batch_size} pictures, {beams} beams, {args.max_new_tokens} tokens, {args.threads} threads; "
          f"medians of {args.rounds} rounds of {args.repeat}; seconds (times as fast as PyTorch)")
    print(f"{'part':18}" + "".join(f"{name:>24}" for name in sides))
    for part in PARTS:
        row = f"{part:18}"
        base = middle(theirs, lambda found: found["parts"][part])
        for name, rounds in sides.items():
            seconds = middle(rounds, lambda found: found["parts"][part])
            ratio = "" if rounds is theirs else f" ({base / seconds:.2f}x)"
            row += f"{f'{seconds:.4f}{ratio}':>24}"
        print(row)
    for label, key, unit in (("loading", "loading_seconds", 1), ("peak GB", "peak_bytes", 1e9)):
        print(f"{label:18}" + "".join(f"{middle(rounds, lambda found: found[key]) / unit:>24.2f}" for rounds in sides.values()))
    fine, expected = True, theirs[0]["tokens"]
    for weights in args.weights:
        for found in sides[f"blip2 {weights}"]:
            lengths = [len(tokens) for tokens in found["tokens"]]
            if lengths != [args.max_new_tokens] * args.batch_size or lengths != [len(tokens) for tokens in expected]:
                sys.exit(f"{weights}: captions of {lengths} tokens, asked for {args.batch_size} of {args.max_new_tokens}")
            pairs = [pair for ours, other in zip(found["tokens"], expected) for pair in zip(ours, other)]
            equal = sum(a == b for a, b in pairs)
            print(f"tokens of {weights}: {equal} of {len(pairs)} equal to PyTorch's")
            fine &= equal == len(pairs) or weights not in ("f32", "f16")
    sys.stdout.flush()
    return fine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="blip2")
    parser.add_argument("--picture", required=True)
    parser.add_argument("--folder", help="a model in Hugging Face layout; made if it is not there")
    parser.add_argument("--vit", default="g", help="of the folder to make: g, l, s")
    parser.add_argument("--llm", default="opt-2.7b", help="of the folder to make: see full_size.py")
    parser.add_argument("--weights", nargs="+", default=["f32"], help="formats this program is measured with")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--num-beams", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both sides; logical cores unless given")
    parser.add_argument("--side", choices=["torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.max_new_tokens < 2:
        parser.error("--max-new-tokens: at least 2, so that there are tokens behind the first")
    if args.side:
        return torch_side(args)
    args.folder = args.folder or os.path.join(tempfile.gettempdir(), f"blip2-vit-{args.vit}-{args.llm}")
    # Written last.
    if not os.path.exists(os.path.join(args.folder, "preprocessor_config.json")):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "full_size.py")
        subprocess.run([sys.executable, script, "--out", args.folder, "--vit", args.vit, "--llm", args.llm], check=True)
    fine = [compare(args, beams) for beams in args.beams]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
