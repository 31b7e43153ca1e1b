"""Golden of stage 2: LAVIS' Blip2OPT.forward with a tiny LLaMA in the place of OPT.

Weights: blip2_tiny.safetensors (query branch), llama_tiny.safetensors (`small.`)
and `llm_proj` here (LAVIS' opt_proj). Sequence: projected queries, BOS, caption,
EOS (LAVIS' newline), padding on the right; nothing before a caption's first
target is learned. Two cases: no prompt, where BOS itself is a target, and a
prompt of two tokens, where BOS and prompt are masked.
"""

import json

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lavis_tiny as tiny
from common import arguments, write_tensors

BOS, EOS, PAD, VOCABULARY = 1, 2, 0, 67
MAX_LENGTH = 9
PROMPT = [8, 41]
LENGTHS = (3, 6, 1, 11)  # captions in tokens; the last is cut and so has no end token


class LlmTokenizer:
    r"""Reads "5 9 13\n" as ids with BOS in front; the newline is the end token."""

    pad_token_id, padding_side = PAD, "right"

    def __call__(self, text, max_length, **_):
        rows = [[BOS, *map(int, t.split()), EOS][:max_length] for t in text]
        ids = torch.full((len(rows), max(map(len, rows))), PAD)
        for row, tokens in zip(ids, rows):
            row[: len(tokens)] = torch.tensor(tokens)
        return tiny.Tokens(ids, (ids != PAD).long())


def language_model(path):
    """The `small` model of llama_tiny.safetensors, frozen."""
    with safe_open(path, "pt") as file:
        shape = json.loads(file.metadata()["golden"])["shape"]
        weights = {k.removeprefix("small."): file.get_tensor(k) for k in file.keys() if k.startswith("small.")}
    shape.pop("head_dim")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=None, **shape)).eval()
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all("rotary" in k for k in missing.missing_keys), missing
    model.requires_grad_(False)
    # LAVIS looks for OPT's embedding table; not a registered child, so the tree stays a tree.
    model.model.__dict__["decoder"] = model.model
    return model


def stage2_model(args):
    """Blip2OPT assembled from the tiny parts instead of its own constructor's downloads."""
    stage1 = tiny.stage1_model(args.lavis)
    from lavis.models.blip2_models.blip2_opt import Blip2OPT

    model = Blip2OPT.__new__(Blip2OPT)
    nn.Module.__init__(model)
    model.visual_encoder, model.ln_vision = stage1.visual_encoder, stage1.ln_vision
    model.Qformer, model.query_tokens = stage1.Qformer, stage1.query_tokens
    tiny.drop_text_branch(model)
    model.opt_model, model.opt_tokenizer = language_model(args.llama), LlmTokenizer()
    model.opt_proj = nn.Linear(tiny.CONFIG["hidden_size"], model.opt_model.config.hidden_size)
    generator = torch.Generator().manual_seed(tiny.SEED + 1)
    model.opt_proj.weight.data = torch.randn(model.opt_proj.weight.shape, generator=generator) / 6
    model.opt_proj.bias.data = 0.1 * torch.randn(model.opt_proj.bias.shape, generator=generator)
    model.max_txt_len = MAX_LENGTH
    return model.train()


def run(model, image, captions, prompt):
    """Tensors of one case: ids, labels, what enters the LLM, its logits, the loss and all gradients."""
    seen = {}

    def look(_module, _args, kwargs, output):
        seen.update(kwargs, logits=output.logits)

    hook = model.opt_model.register_forward_hook(look, with_kwargs=True)
    model.prompt, model.prompt_length = " ".join(map(str, prompt)), torch.tensor([1 + len(prompt)])
    text = [" ".join(map(str, prompt + caption)) for caption in captions]
    model.zero_grad()
    loss = model({"image": image, "text_input": text})["loss"]
    loss.backward()
    hook.remove()
    found = {"ids": model.opt_tokenizer([t + "\n" for t in text], MAX_LENGTH).input_ids, "labels": seen["labels"], "mask": seen["attention_mask"],
             "inputs_embeds": seen["inputs_embeds"], "logits": seen["logits"], "loss": loss}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "key.bias" in name or parameter.grad.abs().max() > 1e-7, name
            found["grad." + name.replace("opt_proj", "llm_proj")] = parameter.grad
        else:
            assert name.startswith("opt_model.") and parameter.grad is None, name
    return found


def main():
    args = arguments(__doc__, lavis="root of a LAVIS checkout at " + tiny.COMMIT, llama="llama_tiny.safetensors")
    model = stage2_model(args)
    generator = torch.Generator().manual_seed(71)
    captions = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    image = tiny.features(70, len(LENGTHS))
    tensors = {"image": image, "llm_proj.weight": model.opt_proj.weight, "llm_proj.bias": model.opt_proj.bias}
    for name, prompt in (("plain", []), ("prompt", PROMPT)):
        tensors |= {f"{name}.{key}": value.clone() for key, value in run(model, image, captions, prompt).items()}
        print(name, tensors[name + ".loss"].item(), tensors[name + ".ids"], tensors[name + ".labels"])
    write_tensors(args, "stage2", tensors, prompt=PROMPT, llm_ids=dict(bos=BOS, eos=EOS, pad=PAD), max_length=MAX_LENGTH, **tiny.header())


if __name__ == "__main__":
    main()
