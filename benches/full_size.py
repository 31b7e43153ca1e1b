"""Random BLIP-2 folders of the published sizes, for tests of memory, speed and tokens without a hub.

    python full_size.py --out DIR --vit g --llm opt-2.7b

Layout, names and types are those of the published folders (f16, bf16 for T5; shards); words are `w0`, `w1`, … so that
every id has a text. Weights are seeded noise scaled so that logits differ and texts don't repeat themselves.
"""

import argparse

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

OPT = dict(vocab_size=50304, bos_token_id=2, eos_token_id=50118, pad_token_id=1)
T5 = dict(vocab_size=32128, bos_token_id=1, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0, d_kv=64,
          feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False)
VITS = {
    "g": dict(),
    "l": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16),
    "s": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6),
}
LLMS = {
    "opt-125m": OPTConfig(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12, word_embed_proj_dim=768, **OPT),
    "opt-2.7b": OPTConfig(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=2560, **OPT),
    "opt-6.7b": OPTConfig(hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096, **OPT),
    "flan-t5-base": T5Config(d_model=768, d_ff=2048, num_layers=12, num_heads=12, **T5),
    "flan-t5-xl": T5Config(d_model=2048, d_ff=5120, num_layers=24, num_heads=32, **T5),
    "flan-t5-xxl": T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, **T5),
}


def tokenizer(config):
    """One word an id, special tokens where the language model has them."""
    t5 = config.model_type == "t5"
    names = {0: "<pad>", 1: "</s>", 2: "<unk>"} if t5 else {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>"}
    image = 32100 if t5 else 50265
    words = {names.get(i, f"w{i}"): i for i in range(image)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    template = ("$A </s>", 1) if t5 else ("</s> $A", 2)
    inner.post_processor = processors.TemplateProcessing(single=template[0], special_tokens=[("</s>", template[1])])
    inner.add_special_tokens([AddedToken(name, special=True) for name in names.values()])
    start = {} if t5 else {"bos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", **start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--llm", choices=LLMS, default="opt-2.7b")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vit", choices=VITS, default="g", help="g: EVA-CLIP's; l, s: the sizes of ViT-L and ViT-S in its architecture")
    args = parser.parse_args()
    make(args.out, args.vit, args.llm, args.seed)


def make(out, vit, llm, seed=1):
    """Writes the folder `out`."""
    text = LLMS[llm]
    dtype = torch.bfloat16 if text.model_type == "t5" else torch.float16
    processor = Blip2Processor(BlipImageProcessor(size={"height": 224, "width": 224}), tokenizer(text), num_query_tokens=32)
    vision = Blip2VisionConfig(**VITS[vit])
    config = Blip2Config(
        vision_config=vision.to_dict(), qformer_config=Blip2QFormerConfig(encoder_hidden_size=vision.hidden_size).to_dict(), text_config=text.to_dict(),
        num_query_tokens=32, image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"))
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.data.fill_(1)
        elif name.endswith("bias"):
            parameter.data.zero_()
        else:
            scale = 1.0 if "embed" in name or "query_tokens" in name or "shared" in name else 1.2 / parameter.shape[-1] ** 0.5
            scale *= 0.15 if text.model_type == "t5" and ".q." in name else 1.0
            scale *= 0.05 if "embed_tokens" in name and text.model_type == "opt" else 1.0
            for row in parameter.data.view(parameter.shape[0], -1).split(4096):
                row.copy_(torch.randn(row.shape, generator=generator).mul_(scale))
    model.tie_weights()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        setattr(model.generation_config, key, getattr(text, key, None))
    model.save_pretrained(out, max_shard_size="5GB")
    processor.save_pretrained(out)
    print(out, f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters")


if __name__ == "__main__":
    main()
