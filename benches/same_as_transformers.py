"""Asks transformers and this program the same of one model folder: tokens must be equal, scores close.

    python same_as_transformers.py --folder DIR --program ../target/release/blip2 --pictures A.jpg B.jpg

For every folder in Hugging Face layout: published, converted, or made by full_size.py. transformers computes in f32
from the weights as they are stored. Ends with 1 if anything differs.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

TEXTS = ["a photo of a cat", "a dog on the grass", "two cups of coffee"]


def run(program, *arguments):
    """Rows the program prints, the seconds it took and the most memory it held."""
    start = time.time()
    with subprocess.Popen([program, *arguments, "--format", "jsonl"], stdout=subprocess.PIPE) as child:
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{program} {' '.join(arguments)} ended with {child.returncode}")
    return [json.loads(line) for line in out.splitlines()], time.time() - start, usage.ru_maxrss / 1e6


def captions(args):
    """Tokens and scores by transformers, per (picture, beams)."""
    processor = AutoProcessor.from_pretrained(args.folder)
    model = Blip2ForConditionalGeneration.from_pretrained(args.folder, dtype=torch.float32).eval()
    found, start = {}, time.time()
    encoder = model.config.text_config.model_type == "t5"
    for name in args.pictures:
        image = Image.open(name)
        inputs = processor(images=image.convert("RGB"), text=args.prompt or None, return_tensors="pt")
        if not args.prompt:
            inputs.pop("input_ids", None), inputs.pop("attention_mask", None)
        for beams in args.beams:
            out = model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=args.max_new_tokens,
                                 return_dict_in_generate=True, output_scores=True)
            if encoder:
                prefix = 1
            else:
                prefix = inputs.input_ids.shape[1] if "input_ids" in inputs else model.config.num_query_tokens + 1
            tokens = out.sequences[0, prefix:].tolist()
            ends = model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [ends]
            stop = min([tokens.index(end) + 1 for end in ends if end in tokens], default=len(tokens))
            score = out.sequences_scores[0].item() if beams > 1 else None
            found[name, beams] = tokens[:stop], score
    print(f"transformers: {time.time() - start:.1f} s for {len(found)} searches")
    return found


def compare_captions(args):
    theirs = captions(args)
    gc.collect()
    worst, wrong = 0.0, 0
    for beams in args.beams:
        rows, seconds, peak = run(args.program, "caption", *args.pictures, "--model", args.folder, "--hf-pixels", "--prompt", args.prompt,
                                  "--num-beams", str(beams), "--max-new-tokens", str(args.max_new_tokens), "--weights", args.weights)
        print(f"blip2, {beams} beams, {args.weights}: {seconds:.1f} s with loading, peak {peak:.2f} GB")
        for row in rows:
            caption = row["captions"][0]
            tokens, score = theirs[row["image"], beams]
            same = caption["tokens"] == tokens
            wrong += not same
            if score is not None and same:
                worst = max(worst, abs(caption["score"] - score))
            if args.show or not same:
                print(f"{'same' if same else 'DIFFERENT'}: {row['image']}, {beams} beams: {caption['text']!r} {caption['tokens']} | {tokens}")
    print(f"{len(theirs) - wrong} of {len(theirs)} searches equal; beam scores differ by at most {worst:.1e}")
    return wrong == 0 and worst < 1e-3


def compare_matches(args):
    processor = AutoProcessor.from_pretrained(args.folder)
    model = Blip2ForImageTextRetrieval.from_pretrained(args.folder, dtype=torch.float32).eval()
    texts = [argument for text in TEXTS for argument in ("--text", text)]
    rows, _, _ = run(args.program, "match", *args.pictures, *texts, "--model", args.folder, "--hf-pixels")
    ours = {(row["image"], row["text"]): row for row in rows}
    worst = 0.0
    for name in args.pictures:
        for text in TEXTS:
            pixels = processor(images=Image.open(name).convert("RGB"), return_tensors="pt").pixel_values
            ids = processor.tokenizer(text, return_tensors="pt")
            inputs = dict(pixel_values=pixels, input_ids=ids.input_ids, attention_mask=ids.attention_mask)
            with torch.no_grad():
                itm = model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(-1)[0, 1].item()
                itc = model(**inputs, use_image_text_matching_head=False).logits_per_image[0, 0].item()
            match = ours[name, text]
            worst = max(worst, abs(match["itm"] - itm), abs(match["itc"] - itc))
    print(f"{len(ours)} pairs; ITM probability and ITC cosine differ by at most {worst:.1e}")
    return worst < 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="the model, in Hugging Face layout")
    parser.add_argument("--program", required=True, help="blip2")
    parser.add_argument("--pictures", nargs="+", required=True)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--weights", default="f32", help="how the program keeps frozen weights")
    parser.add_argument("--show", action="store_true", help="print equal captions, too")
    args = parser.parse_args()
    with torch.no_grad():
        matches = AutoConfig.from_pretrained(args.folder).architectures == ["Blip2ForImageTextRetrieval"]
        sys.exit(0 if (compare_matches if matches else compare_captions)(args) else 1)


if __name__ == "__main__":
    main()
