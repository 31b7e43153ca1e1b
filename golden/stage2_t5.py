"""Golden of stage 2 in front of an encoder-decoder: LAVIS' Blip2T5.forward with the tiny T5 of lavis_files.py.

Weights: blip2_tiny.safetensors (query branch), lavis/t5 and `llm_proj` here (LAVIS' t5_proj). The encoder reads queries and
the text given, the decoder predicts the rest; texts differ in length, and one has nothing given.
"""

import os

import torch
from torch import nn
from transformers import T5ForConditionalGeneration

import lavis_tiny as tiny
from common import HERE, arguments, write_tensors

PAD, EOS, MAX_LENGTH = 0, 1, 9
GIVEN = ([5, 9, 13], [], [7], [20, 21, 22, 23, 24])
WANTED = ([8, 4, 30], [6], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [9, 10])


class Tokenizer:
    """Takes ids for texts; an end token behind each, cut so that it stays."""

    pad_token_id = PAD

    def __call__(self, texts, max_length, **_):
        rows = [list(text)[: max_length - 1] + [EOS] for text in texts]
        ids = torch.full((len(rows), max(map(len, rows))), PAD)
        for row, tokens in zip(ids, rows):
            row[: len(tokens)] = torch.tensor(tokens)
        return tiny.Tokens(ids, (ids != PAD).long())


def stage2_model(args):
    """Blip2T5 assembled from the tiny parts instead of its own constructor's downloads."""
    stage1 = tiny.stage1_model(args.lavis)
    from lavis.models.blip2_models.blip2_t5 import Blip2T5

    model = Blip2T5.__new__(Blip2T5)
    nn.Module.__init__(model)
    model.visual_encoder, model.ln_vision = stage1.visual_encoder, stage1.ln_vision
    model.Qformer, model.query_tokens = stage1.Qformer, stage1.query_tokens
    tiny.drop_text_branch(model)
    model.t5_model = T5ForConditionalGeneration.from_pretrained(os.path.join(HERE, "lavis", "t5")).requires_grad_(False)
    model.t5_tokenizer, model.max_txt_len = Tokenizer(), MAX_LENGTH
    model.t5_proj = nn.Linear(tiny.CONFIG["hidden_size"], model.t5_model.config.d_model)
    generator = torch.Generator().manual_seed(tiny.SEED + 2)
    model.t5_proj.weight.data = torch.randn(model.t5_proj.weight.shape, generator=generator) / 6
    model.t5_proj.bias.data = 0.1 * torch.randn(model.t5_proj.bias.shape, generator=generator)
    return model.train()


def main():
    args = arguments(__doc__, lavis="root of a LAVIS checkout at " + tiny.COMMIT)
    model = stage2_model(args)
    model.t5_model.eval()  # no dropout
    image = tiny.features(72, len(GIVEN))
    loss = model({"image": image, "text_input": GIVEN, "text_output": WANTED})["loss"]
    loss.backward()
    tensors = {"image": image, "llm_proj.weight": model.t5_proj.weight, "llm_proj.bias": model.t5_proj.bias, "loss": loss}
    for name, texts in (("given", GIVEN), ("wanted", WANTED)):
        tensors[name + ".ids"] = model.t5_tokenizer(texts, MAX_LENGTH).input_ids
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors["grad." + name.replace("t5_proj", "llm_proj")] = parameter.grad
        else:
            assert name.startswith("t5_model.") and parameter.grad is None, name
    print(loss.item())
    write_tensors(args, "stage2_t5", tensors, llm_ids=dict(eos=EOS, pad=PAD), max_length=MAX_LENGTH, **tiny.header())


if __name__ == "__main__":
    main()
