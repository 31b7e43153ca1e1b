"""A tiny random Blip2ForImageTextRetrieval folder, and its scores of a picture with several texts.

Writes hf/itm_f16 and blip2_itm.safetensors: matching logits, cosines, the picture's and the texts' features. Values are
computed in f32 from the weights as they are stored.
"""

import copy
import os
import shutil

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from blip2_hf import IMAGE, PATCH, QUERIES, picture
from common import arguments, versions, write_tensors

TEXTS = ["a photo of a dog.", "Two cats!", "a", "a dog and two cats on a photo"]


def tokenizer():
    """BERT's pieces, few of them."""
    words = "a photo of dog two cats and on . ! ##s cat d ##og".split()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + words
    inner = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    inner.add_special_tokens([AddedToken(token, special=True) for token in tokens[:5]])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def build():
    images = BlipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    processor = Blip2Processor(images, tokenizer(), num_query_tokens=QUERIES)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE, patch_size=PATCH).to_dict(),
        qformer_config=Blip2QFormerConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=44, cross_attention_frequency=3, encoder_hidden_size=20, vocab_size=25, max_position_embeddings=40, use_qformer_text_input=True).to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=10,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    config._attn_implementation = "eager"
    model = Blip2ForImageTextRetrieval(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in key.lower() and key.endswith("weight")
        scale = 1.0 if "embed" in key or "query_tokens" in key else 1.5 / max(parameter.shape[-1], 1) ** 0.5
        parameter.data = (1 + 0.2 * noise if norm else noise * scale).half().float()
    return processor, model


def main():
    args = arguments(__doc__)
    processor, model = build()
    folder = os.path.join(args.out, "hf", "itm_f16")
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    processor.save_pretrained(folder)
    tensors = {}
    for i, text in enumerate(TEXTS):
        inputs = processor(images=picture(), text=text, return_tensors="pt")
        matched = model(**inputs, use_image_text_matching_head=True)
        contrast = model(**inputs, use_image_text_matching_head=False)
        tensors[f"itm.{i}"] = matched.logits_per_image[0]
        tensors[f"itc.{i}"] = contrast.logits_per_image.flatten()
        tensors[f"text.{i}"] = contrast.text_embeds[0]
        tensors["image"] = contrast.image_embeds[0]
        print(text, inputs.input_ids.tolist(), torch.softmax(tensors[f"itm.{i}"], -1).tolist(), tensors[f"itc.{i}"].tolist())
    write_tensors(args, "blip2_itm", tensors, versions=versions("torch", "transformers", "tokenizers", "pillow"), texts=TEXTS)


if __name__ == "__main__":
    main()
