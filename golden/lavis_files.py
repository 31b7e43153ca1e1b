"""Tiny checkpoints as LAVIS trains, publishes and fetches them, and what LAVIS makes of them.

Folder lavis/: image encoders as eva_vit_g.pth and clip_vit_L.pth are (f16, with tensors that BLIP-2 leaves out), a
stage-1 checkpoint with everything a run saves beside the model, one fine-tuned with its image encoder, stage-2
checkpoints for an OPT and a T5 (old torch format), and these two as folders with pytorch_model.bin, in one file and
in shards. Values are computed in f32 from the weights as they are stored.
"""

import copy
import os
import shutil
import sys
import types

import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

import blip2_hf
import lavis_tiny as tiny
from common import arguments, write_json, write_tensors

IMAGE, PATCH, WIDTH, HEADS = 42, 14, tiny.CONFIG["encoder_width"], 2
OPT = dict(num_hidden_layers=2, num_attention_heads=3, hidden_size=27, ffn_dim=40, max_position_embeddings=60)
T5 = dict(d_model=26, d_kv=7, d_ff=38, num_layers=2, num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=12)
PROMPTS = ["", "a photo of", "Question: what is it? Answer:"]
# Of sums, not of means: transformers 4.33 counts the start token of T5 into a length, later versions do not.
PENALTY = 0.0


def timm():
    """The three functions of timm that LAVIS' image encoders call."""
    layers = types.ModuleType("timm.models.layers")
    layers.to_2tuple = lambda x: x if isinstance(x, tuple) else (x, x)
    layers.trunc_normal_ = nn.init.trunc_normal_
    layers.drop_path = lambda x, *_: x
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda f: f
    # Their parents, and what else is imported but not called, are stand-ins.
    sys.modules.update({"timm.models.layers": layers, "timm.models.registry": registry})


def randomise(model, seed, dtype=torch.float16):
    """Seeded noise, rounded to the type it is stored in."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
        scale = 0.1 if name.endswith("bias") else 1.0 if "embed" in name and parameter.dim() < 4 else 1.2 / parameter[0].numel() ** 0.5
        parameter.data = (1 + 0.2 * noise if norm else scale * noise).to(dtype).float()
    return model.eval().requires_grad_(False)


def encoders():
    """LAVIS' own encoders at tiny sizes."""
    from lavis.models.clip_vit import VisionTransformer as Clip
    from lavis.models.eva_vit import VisionTransformer as Eva

    eva = Eva(img_size=IMAGE, patch_size=PATCH, use_mean_pooling=False, embed_dim=WIDTH, depth=2, num_heads=HEADS, mlp_ratio=1.7,
              qkv_bias=True, norm_layer=lambda n: nn.LayerNorm(n, eps=1e-6))
    clip = Clip(input_resolution=IMAGE, patch_size=PATCH, width=WIDTH, layers=3, heads=HEADS, use_grad_checkpointing=False)
    return randomise(eva, 5), randomise(clip, 6)


def rounded(model):
    """Weights as half precision holds them: stored so, the files are half as large, and lose nothing."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model.eval()


def half(state):
    return {key: value.half() for key, value in state.items()}


def stage2(lavis_class, stage1, encoder, llm, projection):
    """Blip2OPT or Blip2T5 assembled without its constructor's downloads; sentences are made as its `generate` does."""
    model = lavis_class.__new__(lavis_class)
    nn.Module.__init__(model)
    model.ln_vision, model.Qformer, model.query_tokens = stage1.ln_vision, stage1.Qformer, stage1.query_tokens
    tiny.drop_text_branch(model)
    width = llm.config.hidden_size
    generator = torch.Generator().manual_seed(width)
    linear = nn.Linear(tiny.CONFIG["hidden_size"], width)
    linear.weight.data = torch.randn(linear.weight.shape, generator=generator) / 6
    linear.bias.data = 0.1 * torch.randn(width, generator=generator)
    rounded(linear)
    setattr(model, projection, linear)
    model.visual_encoder = encoder
    setattr(model, projection.replace("proj", "model"), llm)
    # As a run of LAVIS saves: everything but the names of frozen parameters, of which a tied one has more than are listed.
    llm.requires_grad_(False), encoder.requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    saved = half({name: tensor for name, tensor in model.state_dict().items() if name not in frozen})
    return model.eval().requires_grad_(False), saved


def language(t5):
    """A tokenizer and a language model whose sentences end, now and then."""
    tokenizer = blip2_hf.sentence_pieces() if t5 else blip2_hf.tokenizer()
    vocabulary = len(tokenizer) + 3
    if t5:
        end = 1
        config = T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", tie_word_embeddings=False, eos_token_id=1,
                          pad_token_id=0, decoder_start_token_id=0, **T5)
        # LAVIS loads every FlanT5 with this activation.
        config.dense_act_fn = "gelu"
        model = T5ForConditionalGeneration(config)
    else:
        end = tokenizer("\n", add_special_tokens=False).input_ids[0]
        model = OPTForCausalLM(OPTConfig(vocab_size=vocabulary, word_embed_proj_dim=OPT["hidden_size"], bos_token_id=2, eos_token_id=2, pad_token_id=1, **OPT))
    randomise(model, 7 + t5)
    # Words that are too large only repeat themselves.
    model.get_input_embeddings().weight.data.mul_(0.25)
    model.get_output_embeddings().weight.data[end] *= 1.6
    return tokenizer, rounded(model), end


def sentences(model, tokenizer, end, pixels, t5):
    """What LAVIS' `generate` does up to its call of transformers: soft words, then the prompt."""
    with torch.no_grad():
        features = model.ln_vision(model.visual_encoder(pixels))
        queries = model.Qformer.bert(query_embeds=model.query_tokens.expand(len(pixels), -1, -1), encoder_hidden_states=features,
                                     encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long), return_dict=True)
        soft = (model.t5_proj if t5 else model.opt_proj)(queries.last_hidden_state)
        llm = model.t5_model if t5 else model.opt_model
        found = []
        for prompt in PROMPTS:
            ids = tokenizer([prompt] * len(pixels), return_tensors="pt").input_ids
            words = torch.cat([soft, llm.get_input_embeddings()(ids)], 1)
            for beams in (1, 5):
                out = llm.generate(inputs_embeds=words, attention_mask=torch.ones(words.shape[:2], dtype=torch.long), do_sample=False,
                                   num_beams=beams, max_new_tokens=8, min_length=1, eos_token_id=end, length_penalty=PENALTY)
                for picture, row in enumerate(out.tolist()):
                    row = row[1:]  # T5's decoder starts with a token; for OPT transformers 4.33 puts one there that nobody reads
                    row = row[: row.index(end) + 1] if end in row else row
                    found.append(dict(llm="t5" if t5 else "opt", prompt=prompt, beams=beams, picture=picture, tokens=row,
                                      text=tokenizer.decode(row, skip_special_tokens=True).strip()))
    return soft, found


def captions(stage1, features):
    """What Blip2Qformer.generate writes; beams are not repeated before transformers does it once more."""
    found = []
    for beams in (1, 3):
        rows = stage1.Qformer.generate(
            input_ids=torch.full((len(features), 1), tiny.DEC), query_embeds=stage1.query_tokens.expand(len(features), -1, -1), max_length=11, min_length=1,
            num_beams=beams, do_sample=False, eos_token_id=tiny.SEP, pad_token_id=tiny.PAD, length_penalty=PENALTY,
            encoder_hidden_states=features, encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long))
        for picture, row in enumerate(rows.tolist()):
            row = row[1:]
            found.append(dict(beams=beams, picture=picture, tokens=row[: row.index(tiny.SEP) + 1] if tiny.SEP in row else row))
    return found


def opt_files(tokenizer, folder):
    """Only what OPT's published folders have: no tokenizer.json."""
    tokenizer.backend_tokenizer.model.save(folder)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
        file.write('{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}\n')


def main():
    args = arguments(__doc__, lavis="root of a LAVIS checkout at " + tiny.COMMIT)
    timm()
    root = os.path.join(args.out, "lavis")
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(root)
    path = lambda name: os.path.join(root, name)  # noqa: E731
    stage1 = rounded(tiny.stage1_model(args.lavis))
    eva, clip = encoders()
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(3))
    tensors = {"pixels": pixels, "eva": eva(pixels), "clip": clip(pixels)}

    unused = {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH), "head.weight": torch.ones(3, WIDTH), "head.bias": torch.ones(3)}
    torch.save(half(eva.state_dict() | unused), path("eva.pth"))
    unused = {"ln_post.weight": torch.ones(WIDTH), "ln_post.bias": torch.zeros(WIDTH), "proj": torch.ones(WIDTH, 4)}
    torch.save(half(clip.state_dict() | unused), path("clip.pth"))

    state = stage1.state_dict()
    some = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.AdamW([some], lr=1e-4)
    some.grad = torch.ones(3, 2)
    optimizer.step()
    run = {"optimizer": optimizer.state_dict(), "config": {"model": {"arch": "blip2"}, "run": {"max_epoch": 10, "device": "cuda"}}, "scaler": {"scale": 65536.0}, "epoch": 9}
    torch.save({"model": half(state), **run}, path("stage1.pth"))
    with_encoder = state | {"visual_encoder." + key: value for key, value in eva.state_dict().items()}
    torch.save({"model": half(with_encoder)}, path("stage1_finetuned.pth"), _use_new_zipfile_serialization=False)

    ids = torch.tensor([[1, 5, 9, 13, 2], [1, 40, 2, 0, 0]])
    with torch.no_grad():
        image_features = stage1.ln_vision(eva(pixels))
        queries = stage1.Qformer.bert(query_embeds=stage1.query_tokens.expand(2, -1, -1), encoder_hidden_states=image_features, return_dict=True)
        tensors["image_embeds"] = nn.functional.normalize(stage1.vision_proj(queries.last_hidden_state), dim=-1)
        texts = stage1.Qformer.bert(ids, attention_mask=(ids != 0).long(), return_dict=True)
        tensors["text_embeds"] = nn.functional.normalize(stage1.text_proj(texts.last_hidden_state[:, 0]), dim=-1)
        tensors |= {"image_hidden": queries.last_hidden_state, "text_hidden": texts.last_hidden_state}
        both = stage1.Qformer.bert(ids, query_embeds=stage1.query_tokens.expand(2, -1, -1), attention_mask=torch.cat([torch.ones(2, tiny.CONFIG["query_length"]).long(), (ids != 0).long()], 1),
                                   encoder_hidden_states=image_features, return_dict=True)
        tensors["multimodal"] = both.last_hidden_state[:, : tiny.CONFIG["query_length"]]
        written = captions(stage1, image_features)
        tensors["itm"] = stage1.compute_itm(image_features, ids, (ids != 0).long())
    tensors["ids"] = ids

    from lavis.models.blip2_models.blip2_opt import Blip2OPT
    from lavis.models.blip2_models.blip2_t5 import Blip2T5

    results = []
    for t5, shards in ((False, "1GB"), (True, "25KB")):
        name = "t5" if t5 else "opt"
        tokenizer, llm, end = language(t5)
        model, saved = stage2(Blip2T5 if t5 else Blip2OPT, rounded(tiny.stage1_model(args.lavis)), eva, llm, name + "_proj")
        torch.save({"model": saved}, path(f"stage2_{name}.pth"), _use_new_zipfile_serialization=t5)
        copy.deepcopy(llm).half().save_pretrained(path(name), safe_serialization=False, max_shard_size=shards)
        if t5:
            tokenizer.save_pretrained(path(name))
        else:
            opt_files(tokenizer, path(name))
        tensors["soft_words." + name], found = sentences(model, tokenizer, end, pixels, t5)
        results += found
        print(name, [row["text"] for row in found])
    write_tensors(args, "lavis_files", tensors, prompts=PROMPTS, **tiny.header())
    write_json(args, "lavis_files", {**tiny.header(), "searches": results, "captions": written})


if __name__ == "__main__":
    main()
