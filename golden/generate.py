"""Golden of decoding: transformers' generate from embedded prompts, and its logits processors.

Three left-padded prompts of different length, given as embeddings only (so a
repetition penalty sees the generated tokens alone). generate.json holds the
cases: settings, tokens and, with beams, scores; generate.safetensors the prompts
and processed logits. Every prompt of every case is
also run alone, unpadded and in f64, and must give the same tokens.
"""

import itertools

import torch
from transformers import GenerationConfig
from transformers.generation import (MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
                                     TopKLogitsWarper, TopPLogitsWarper)

import llama_tiny as tiny
from common import arguments, write_json, write_tensors

LENGTHS = (7, 4, 6)
TOKENS = 12


def prompts():
    """(3, 7, 40) embeddings, padded on the left with noise, and their mask."""
    embeds = torch.randn(3, max(LENGTHS), tiny.SHAPE["hidden_size"], generator=torch.Generator().manual_seed(60))
    mask = torch.zeros(3, max(LENGTHS), dtype=torch.long)
    for row, length in zip(mask, LENGTHS):
        row[-length:] = 1
    return embeds, mask


def settings():
    """(model, generation settings) of every case."""
    both = [tiny.EOS, tiny.OTHER_EOS]
    for model, eos in itertools.product(("small", "wide"), (tiny.EOS, both)):
        yield model, dict(eos_token_id=eos)
        yield model, dict(eos_token_id=eos, repetition_penalty=1.3)
        yield model, dict(eos_token_id=eos, min_new_tokens=4)
        yield model, dict(eos_token_id=eos, num_beams=3, num_return_sequences=3)
    for beams, penalty, early in itertools.product((2, 3, 5), (-1.0, 0.0, 1.0, 2.0), (False, True, "never")):
        yield "small", dict(eos_token_id=tiny.EOS, num_beams=beams, length_penalty=penalty, early_stopping=early, num_return_sequences=beams)
    for beams in (2, 5):
        more = dict(num_beams=beams, num_return_sequences=2, length_penalty=-1.0)
        yield "small", dict(eos_token_id=both, repetition_penalty=1.3, **more)
        yield "small", dict(eos_token_id=both, min_new_tokens=4, **more)
        yield "wide", dict(eos_token_id=tiny.EOS, repetition_penalty=1.3, min_new_tokens=4, **more)


def run(model, choice, embeds, mask):
    """(tokens per sequence without padding, scores per sequence or None)."""
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, bos_token_id=tiny.BOS, pad_token_id=tiny.PAD,
                              return_dict_in_generate=True, output_scores=True, **choice)
    output = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
    ends = choice["eos_token_id"] if isinstance(choice["eos_token_id"], list) else [choice["eos_token_id"]]
    tokens = []
    for row in output.sequences.tolist():
        stop = min([row.index(end) + 1 for end in ends if end in row], default=len(row))
        # Greedy search fills with the pad id; beam search with the end id, as it takes a pad id of 0 for none.
        assert len(set(row[stop:])) <= 1
        tokens.append(row[:stop])
    scores = getattr(output, "sequences_scores", None)
    return tokens, scores.tolist() if scores is not None else None


def processed():
    """Logits through transformers' processors, alone and in the order generate applies them."""
    generator = torch.Generator().manual_seed(61)
    logits, ids = 3 * torch.randn(4, 67, generator=generator), torch.randint(0, 67, (4, 6), generator=generator)
    logits[3] /= 3
    # Three large values, then ten equal ones: top-k must cut there, top-p must not (which of them falls is left to the sort).
    logits[3, [5, 33, 60]] = torch.tensor([6.5, 7.0, 6.0])
    logits[3, 10:20] = 2.5
    chains = {"temperature_0.7": [TemperatureLogitsWarper(0.7)], "temperature_1.5": [TemperatureLogitsWarper(1.5)],
              "top_k_5": [TopKLogitsWarper(5)], "top_k_500": [TopKLogitsWarper(500)], "top_k_1_keep_2": [TopKLogitsWarper(1, min_tokens_to_keep=2)],
              "repetition_1.3": [RepetitionPenaltyLogitsProcessor(1.3)],
              "min_new_8": [MinNewTokensLengthLogitsProcessor(0, 8, [tiny.EOS, tiny.OTHER_EOS])],
              "all": [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)]}
    for p in (0.9, 0.5, 0.05):
        chains |= {f"top_p_{p}": [TopPLogitsWarper(p)], f"top_p_{p}_keep_2": [TopPLogitsWarper(p, min_tokens_to_keep=2)]}
    found = {"logits": logits, "ids": ids}
    for name, chain in chains.items():
        value = logits.clone()
        for processor in chain:
            value = processor(ids, value)
        found["processed." + name] = value
    return found


def main():
    args = arguments(__doc__)
    embeds, mask = prompts()
    models = {name: tiny.build(name) for name in tiny.SEEDS}
    doubles = {name: tiny.build(name).double() for name in tiny.SEEDS}
    cases, lengths = [], []
    for name, choice in settings():
        tokens, scores = run(models[name], choice, embeds, mask)
        alone = [run(doubles[name], choice, embeds[i : i + 1, -n:].double(), mask[i : i + 1, -n:])[0] for i, n in enumerate(LENGTHS)]
        assert tokens == sum(alone, []), ("rounding or padding decides", name, choice, tokens, alone)
        cases.append({"model": name, "settings": choice, "tokens": tokens, **({"scores": scores} if scores else {})})
        lengths.append([len(row) for row in tokens])
    print(len(cases), lengths)
    write_json(args, "generate", tiny.header() | {"max_new_tokens": TOKENS, "cases": cases})
    write_tensors(args, "generate", {"embeds": embeds, "mask": mask} | processed(), **tiny.header())


if __name__ == "__main__":
    main()
