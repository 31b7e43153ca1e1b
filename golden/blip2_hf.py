"""Tiny random BLIP-2 folders as transformers writes them, and what transformers makes of a picture.

Each case is a folder hf/NAME with config, processor, tokenizer and weights (f32, f16 or bf16; one file or
several shards), and golden values in blip2_hf.safetensors and blip2_hf.json: pixels, every stage's activations,
logits behind the prompt, greedy and beam tokens with their scores. Values are computed in f32 from the weights as
they are stored. Widths and heads are odd on purpose.
"""

import copy
import os
import shutil

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from common import arguments, versions, write_json, write_tensors

QUERIES, IMAGE, PATCH = 5, 42, 14
PROMPTS = ["", "Question: what is it? Answer:", "a photo of"]
SEARCHES = {
    "greedy": dict(num_beams=1, max_new_tokens=8),
    "greedy_min": dict(num_beams=1, max_new_tokens=8, min_new_tokens=6),
    "beams": dict(num_beams=4, max_new_tokens=8),
    "short_beams": dict(num_beams=3, max_new_tokens=7, length_penalty=-1.0),
    "long_beams": dict(num_beams=3, max_new_tokens=7, length_penalty=1.5),
    # The ids of the prompt count, too, where there is no encoder.
    "penalised": dict(num_beams=1, max_new_tokens=8, repetition_penalty=1.7),
    "penalised_beams": dict(num_beams=3, max_new_tokens=8, repetition_penalty=1.4),
}
OPT = dict(num_hidden_layers=2, num_attention_heads=3, hidden_size=27, ffn_dim=40, max_position_embeddings=60)
T5 = dict(d_model=26, d_kv=7, d_ff=38, num_layers=3, num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=12)
LLAMA = dict(hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=60,
             tie_word_embeddings=False)
# name: (seed, type of the stored weights, largest shard, language model)
CASES = {
    "opt_f32": (1, torch.float32, "1GB", OPT),
    "opt_f16_sharded": (2, torch.float16, "20KB", {**OPT, "num_attention_heads": 2, "hidden_size": 22}),
    "opt_bf16_untied": (3, torch.bfloat16, "1GB", {**OPT, "tie_word_embeddings": False}),
    # As the published files: a gate, the error-function GELU, a head of its own.
    "t5_bf16": (4, torch.bfloat16, "1GB", {**T5, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False}),
    "t5_f16_tied": (5, torch.float16, "60KB", {**T5, "feed_forward_proj": "relu", "num_layers": 2, "tie_word_embeddings": True}),
    # Any causal language model may stand there; grouped keys, a head of its own.
    "llama_f16": (7, torch.float16, "1GB", LLAMA),
    "t5_f16_tanh": (6, torch.float16, "1GB", {**T5, "feed_forward_proj": "gated-gelu", "num_layers": 2, "tie_word_embeddings": False}),
}


def sentence_pieces():
    """Unigram pieces as T5's, the end token behind every text."""
    letters = list("abcdefghijklmnopqrstuvwxyzQA?:. ")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁what", -4.0), ("▁is", -4.0), ("▁a", -3.5), ("▁photo", -5.0)]
    pieces += [(letter, -3.0 - i / 10) for i, letter in enumerate(letters) if letter != " "]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def tokenizer():
    """Byte-level BPE with GPT-2's bytes and a few merges, special ids as OPT's, the start token in front."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("h", "o"), ("t", "o"), ("Q", "u"), ("e", "s"), ("Ġ", "p"), ("i", "s"), ("Ġ", "is")]
    tokens = ["<s>", "<pad>", "</s>", "<unk>"] + letters + ["".join(pair) for pair in merges]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    inner.add_special_tokens([AddedToken(token, special=True) for token in tokens[:4]])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def build(name):
    """Processor and model of a case; weights already rounded to the stored type, held in f32."""
    seed, dtype, shard, language = CASES[name]
    images = BlipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    t5 = "d_model" in language
    processor = Blip2Processor(images, sentence_pieces() if t5 else tokenizer(), num_query_tokens=QUERIES)
    ids = len(processor.tokenizer)
    if t5:
        end = 1
        text = T5Config(vocab_size=ids + 3, bos_token_id=1, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0, **language)
    elif "num_key_value_heads" in language:
        end = processor.tokenizer("\n", add_special_tokens=False).input_ids[0]
        text = LlamaConfig(vocab_size=ids + 3, eos_token_id=end, bos_token_id=2, pad_token_id=1, **language)
    else:
        end = processor.tokenizer("\n", add_special_tokens=False).input_ids[0]
        text = OPTConfig(vocab_size=ids + 3, word_embed_proj_dim=language["hidden_size"], eos_token_id=end, bos_token_id=2, pad_token_id=1, **language)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE, patch_size=PATCH).to_dict(),
        qformer_config=Blip2QFormerConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=44, cross_attention_frequency=3, encoder_hidden_size=20, vocab_size=50).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    config._attn_implementation = "eager"
    model = Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = ("norm" in key.lower()) and key.endswith("weight")
        scale = 1.0 if "embed" in key or "query_tokens" in key else 1.5 / max(parameter.shape[-1], 1) ** 0.5
        # Words of a tied model that are too large only repeat themselves.
        scale *= 0.25 if "embed_tokens" in key or "shared" in key else 1.0
        # T5 does not scale its scores.
        scale *= 0.6 if "SelfAttention.q" in key or "EncDecAttention.q" in key else 1.0
        parameter.data = 1 + 0.2 * noise if norm else noise * scale
    # Small enough that sentences end, now and then.
    head = model.language_model.get_output_embeddings().weight.data
    head[end] *= 1.6
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    if language.get("tie_word_embeddings", True):
        model.tie_weights()
    return processor, model, dtype, shard


def picture():
    y, x, c = np.meshgrid(np.arange(50), np.arange(61), np.arange(3), indexing="ij")
    return Image.fromarray(((7 * y + 5 * x + 40 * c + (x * y) // 5) % 256).astype(np.uint8))


def hidden(model, pixels):
    """Every stage's activations."""
    vision = model.vision_model(pixels).last_hidden_state
    queries = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=vision).last_hidden_state
    return dict(ln_vision=vision, queries=queries, soft_words=model.language_projection(queries))


def search(model, processor, image, prompt, options):
    """New tokens and the score of one search."""
    inputs = processor(images=image, text=prompt or None, return_tensors="pt")
    if not prompt:
        inputs.pop("input_ids", None), inputs.pop("attention_mask", None)
    out = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True, **options)
    if model.config.text_config.model_type == "t5":
        prefix = 1
    else:
        prefix = inputs.input_ids.shape[1] if "input_ids" in inputs else QUERIES + 1
    tokens = out.sequences[0, prefix:].tolist()
    stop = model.generation_config.eos_token_id
    if stop in tokens:
        tokens = tokens[: tokens.index(stop) + 1]
    if options["num_beams"] > 1:
        score = out.sequences_scores[0].item()
    else:
        steps = [torch.log_softmax(logits[0].float(), -1)[t] for logits, t in zip(out.logits, tokens)]
        score = torch.stack(steps).sum().item()
    return dict(tokens=tokens, score=score, text=processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()), out.logits[0][0]


def main():
    args = arguments(__doc__)
    image, tensors, results = picture(), {"picture": torch.from_numpy(np.array(picture()))}, []
    for name in CASES:
        processor, model, dtype, shard = build(name)
        model.generation_config.eos_token_id = model.config.text_config.eos_token_id
        model.generation_config.bos_token_id = model.config.text_config.bos_token_id
        model.generation_config.decoder_start_token_id = getattr(model.config.text_config, "decoder_start_token_id", None)
        model.generation_config.pad_token_id = model.config.text_config.pad_token_id
        folder = os.path.join(args.out, "hf", name)
        shutil.rmtree(folder, ignore_errors=True)
        copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard)
        processor.save_pretrained(folder)
        pixels = processor(images=image, return_tensors="pt").pixel_values
        tensors[f"{name}.pixels"] = pixels
        tensors |= {f"{name}.{key}": value for key, value in hidden(model, pixels).items()}
        for i, prompt in enumerate(PROMPTS):
            for kind, options in SEARCHES.items():
                found, logits = search(model, processor, image, prompt, options)
                results.append(dict(case=name, prompt=prompt, search=kind, options=options, **found))
            tensors[f"{name}.logits.{i}"] = logits
        print(name, [r["tokens"] for r in results if r["case"] == name])
    about = dict(versions=versions("torch", "transformers", "tokenizers", "pillow"), prompts=PROMPTS)
    write_tensors(args, "blip2_hf", tensors, **about)
    write_json(args, "blip2_hf", {**about, "searches": results})


if __name__ == "__main__":
    main()
