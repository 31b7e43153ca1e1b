"""What keeping a model's weights in fewer bits does to its captions: each format beside f32, on the same pictures.

    python quality_gate.py --program ../target/release/blip2 --model mini --weights auto f16 q8_0 q4_k PICTURE_OR_FOLDER...

Needs nothing but Python. Greedy captions of one stage, the second unless told otherwise; of each format the share of captions and
of tokens that are f32's (a caption's tokens count until it leaves f32's), and by how much the log-probability of equal captions
differs, a token. A format passes if at least 99 of 100 tokens are equal and the log-probability is off by at most 0.01 in the
mean. Ends with 1 if `auto`, what the program takes unless told otherwise, does not pass.
"""

import argparse
import json
import statistics
import subprocess
import sys

LEAST_EQUAL, MOST_OFF = 0.99, 0.01


def captions(args, weights):
    """Tokens and their log-probability of each picture."""
    command = [args.program, "caption", "--model", args.model, "--weights", weights, "--stage", args.stage, "--num-beams", "1", "--format", "jsonl", *args.pictures]
    rows = map(json.loads, subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines())
    return {row["image"]: (row["captions"][0]["tokens"], row["captions"][0]["score"]) for row in rows}


def common(a, b):
    """So many tokens at the beginning are the same."""
    return next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="blip2")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--weights", nargs="+", default=["auto", "f16", "q8_0", "q4_k"])
    parser.add_argument("--stage", choices=["1", "2"], default="2", help="who writes")
    parser.add_argument("pictures", nargs="+")
    args = parser.parse_args()
    exact = captions(args, "f32")
    total = sum(len(tokens) for tokens, _ in exact.values())
    print(f"{args.model}: {len(exact)} pictures, {total} tokens in f32")
    print(f"{'weights':8}{'equal captions':>16}{'equal tokens':>14}{'off by, a token':>17}{'at most':>9}")
    fine = True
    for weights in args.weights:
        found = captions(args, weights)
        if found.keys() != exact.keys():
            sys.exit(f"{weights}: {len(found)} pictures captioned, not {len(exact)}")
        pairs = [(exact[image], found[image]) for image in exact]
        equal = [(ours, theirs, len(tokens)) for (tokens, ours), (other, theirs) in pairs if tokens == other]
        tokens = sum(common(a, b) for (a, _), (b, _) in pairs) / total
        off = [abs(a - b) / max(1, length) for a, b, length in equal] or [float("inf")]
        passes = tokens >= LEAST_EQUAL and statistics.mean(off) <= MOST_OFF
        fine &= passes or weights != "auto"
        print(f"{weights:8}{len(equal) / len(pairs):>16.1%}{tokens:>14.1%}{statistics.mean(off):>17.1e}{max(off):>9.1e}  "
              + ("passes" if passes else "does not pass"))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
