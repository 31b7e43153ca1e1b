"""One training step at the published sizes, by this program and by the reference: the loss and every gradient.

    python full_size.py --out W/hf --llm opt-2.7b
    python full_step.py --stage 2 --work W --program ../target/release/blip2 --recipe ../recipes/stage2_vitg_opt2.7b.toml
    python full_step.py --stage 1 --work W1 --program … --recipe ../recipes/stage1_vitg.toml --lavis LAVIS   (LAVIS's environment)

Random weights, two square pictures with a caption each, no dropout, frozen parts in f16 as they are stored. The program trains two
steps from its recipe; its gradients are read out of the first checkpoint, where AdamW's first average is a tenth of them. With
two pictures each is the other's only negative, so nothing is left to chance. The reference is transformers' model for stage 2
and LAVIS's for stage 1, in f32. Ends with 1 if the loss differs by more than 1e-3 or a gradient by more than 1e-2, relative to its largest entry.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

HERE = os.path.dirname(os.path.abspath(__file__))
CAPTIONS = {1: ["a cat lies on a sofa", "two dogs run over wet grass near the sea"], 2: ["w11 w250 w3010 w77", "w5 w9000 w123 w4567 w890 w31 w2222"]}
SIDE = 300
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# ours: the reference's, inside the bridge
NAMES = [
    (r"^qformer\.layers\.(\d+)\.self_attn\.([qkv])\.", r"L\1.attention.SELF.\2."),
    (r"^qformer\.layers\.(\d+)\.self_attn\.out\.", r"L\1.attention.output.dense."),
    (r"^qformer\.layers\.(\d+)\.self_attn_norm\.", r"L\1.attention.output.LayerNorm."),
    (r"^qformer\.layers\.(\d+)\.cross_attn\.([qkv])\.", r"L\1.crossattention.SELF.\2."),
    (r"^qformer\.layers\.(\d+)\.cross_attn\.out\.", r"L\1.crossattention.output.dense."),
    (r"^qformer\.layers\.(\d+)\.cross_attn_norm\.", r"L\1.crossattention.output.LayerNorm."),
    (r"^qformer\.layers\.(\d+)\.ffn_query\.fc1\.", r"L\1.intermediate_query.dense."),
    (r"^qformer\.layers\.(\d+)\.ffn_query\.fc2\.", r"L\1.output_query.dense."),
    (r"^qformer\.layers\.(\d+)\.ffn_query\.norm\.", r"L\1.output_query.LayerNorm."),
    (r"^qformer\.layers\.(\d+)\.ffn_text\.fc1\.", r"L\1.intermediate.dense."),
    (r"^qformer\.layers\.(\d+)\.ffn_text\.fc2\.", r"L\1.output.dense."),
    (r"^qformer\.layers\.(\d+)\.ffn_text\.norm\.", r"L\1.output.LayerNorm."),
    (r"^qformer\.(word|position)_embeddings\.", r"BERT.embeddings.\1_embeddings."),
    (r"^qformer\.lm_head\.dense\.", "Qformer.cls.predictions.transform.dense."),
    (r"^qformer\.lm_head\.norm\.", "Qformer.cls.predictions.transform.LayerNorm."),
    (r"^qformer\.lm_head\.bias", "Qformer.cls.predictions.bias"),
]


def theirs(name, stage):
    """The reference's name of one of our parameters."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    for short, long in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f"SELF.{short}.", f"SELF.{long}.")
    if stage == 1:
        return name.replace("qformer.embed_norm", "Qformer.bert.embeddings.LayerNorm").replace("BERT", "Qformer.bert").replace("SELF", "self") if not name.startswith("L") \
            else "Qformer.bert.encoder.layer." + name[1:].replace("SELF", "self")
    if name.startswith("L"):
        return "qformer.encoder.layer." + name[1:].replace("SELF", "attention")
    return name.replace("qformer.embed_norm", "qformer.layernorm").replace("ln_vision", "vision_model.post_layernorm").replace("llm_proj", "language_projection")


def pictures():
    y, x, c = np.meshgrid(np.arange(SIDE), np.arange(SIDE), np.arange(3), indexing="ij")
    return [Image.fromarray(((a * y + b * x + 40 * c + (x * y) // 50) % 256).astype(np.uint8)) for a, b in ((3, 1), (1, 2))]


def pixels():
    images = [np.asarray(p.resize((224, 224), Image.BICUBIC), np.float32) / 255 for p in pictures()]
    return torch.from_numpy((np.stack(images) - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2).contiguous().float()


def write_data(folder, stage):
    os.makedirs(folder, exist_ok=True)
    with tarfile.open(os.path.join(folder, "train-00000.tar"), "w") as tar:
        for i, (picture, caption) in enumerate(zip(pictures(), CAPTIONS[stage])):
            png = io.BytesIO()
            picture.save(png, "png")
            for name, content in ((f"{i:08}.png", png.getvalue()), (f"{i:08}.json", json.dumps({"caption": caption}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_bert(folder):
    """What a recipe reads of a BERT that it does not start from: its shape and its word pieces."""
    os.makedirs(folder, exist_ok=True)
    shape = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, max_position_embeddings=512, layer_norm_eps=1e-12)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(shape, file)
    shutil.copy(os.path.join(HERE, "..", "models", "mini", "vocab.txt"), folder)


def ours(args, settings):
    """Loss parts of the first step and all gradients."""
    run = os.path.join(args.work, "run")
    shutil.rmtree(run, ignore_errors=True)
    stage = f"stage{args.stage}"
    settings = {
        "data.dir": os.path.join(args.work, "data"), "augment.scale": "[1.0, 1.0]", "augment.ratio": "[1.0, 1.0]", "augment.flip": 0.0, "model.qformer.dropout": 0.0,
        "model.qformer.init.path": os.path.join(args.work, "bert"), f"{stage}.train.batch_size": 2, f"{stage}.train.steps": 2, f"{stage}.optimizer.warmup_steps": 1,
        "runtime.checkpoint_every": 1, "runtime.log_every": 1, "runtime.loaders": 1, **settings,
    }
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value if isinstance(value, str) and value.startswith('[') else json.dumps(value)}")]
    start = time.time()
    with subprocess.Popen([args.program, "train", args.recipe, "--out", run, *changes]) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit("the program failed")
    print(f"blip2: {time.time() - start:.0f} s for two steps with loading and saving, peak {usage.ru_maxrss / 1e6:.1f} GB")
    with open(os.path.join(run, stage, "metrics.jsonl")) as file:
        first = json.loads(file.readline())
    state = load_file(os.path.join(run, stage, "checkpoints", "step-00000001", "optimizer.safetensors"))
    return first, {name[2:]: tensor for name, tensor in state.items() if name.startswith("m.")}


def compare(args, parts, expected, grads, their_grads, beta1):
    wrong = 0
    for name, value in expected.items():
        found = parts[name] if name in parts else parts["parts"][name]
        wrong += abs(found - value) > 1e-3 * max(1, abs(value))
        print(f"{name}: {found:.6f} here, {value:.6f} there")
    worst = (0.0, "")
    for name, average in grads.items():
        other = their_grads.pop(theirs(name, args.stage))
        grad = average / (1 - beta1)
        scale = other.abs().max().item()
        # Zero up to rounding: a key's bias adds the same to every score of a row.
        if re.search(r"attn\.k\.bias$", name):
            continue
        worst = max(worst, ((grad.reshape(other.shape) - other).abs().max().item() / max(scale, 1e-12), name))
    wrong += worst[0] > 1e-2 or bool(their_grads)
    print(f"{len(grads)} gradients, the worst differs by {worst[0]:.1e} ({worst[1]}); without a partner: {list(their_grads)[:5]}")
    return wrong == 0


def stage2(args):
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    hf, folder = os.path.join(args.work, "hf"), os.path.join(args.work, "ours")
    if not os.path.exists(folder):
        subprocess.run([args.program, "convert", hf, folder, "--layout", "blip2"], check=True)
    parts, grads = ours(args, {"model.vision.path": folder, "model.llm.path": folder, "stage2.init": os.path.join(folder, "stage2.safetensors"), "stage2.prefix_lm": False})
    processor = AutoProcessor.from_pretrained(hf)
    model = Blip2ForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    model.requires_grad_(False)
    for part in (model.qformer, model.language_projection, model.vision_model.post_layernorm):
        part.requires_grad_(True)
    model.query_tokens.requires_grad_(True)
    config, tokenizer = model.config, processor.tokenizer
    image = [config.image_token_index] * config.num_query_tokens
    words = [tokenizer(text, add_special_tokens=False).input_ids for text in CAPTIONS[2]]
    pad = lambda rows, fill: torch.tensor([row + [fill] * (max(map(len, rows)) - len(row)) for row in rows])  # noqa: E731
    if config.text_config.model_type == "t5":
        ids = pad([image + [1] for _ in words], 0)
        labels, mask = pad([w + [1] for w in words], -100), torch.ones_like(ids)
    else:
        end = config.text_config.eos_token_id
        rows = [[2, *w, end] for w in words]
        ids, labels = pad([image + row for row in rows], 1), pad([[-100] * len(image) + row for row in rows], -100)
        mask = (labels != -100).long()
        mask[:, : len(image)] = 1
    start = time.time()
    loss = model(pixel_values=pixels(), input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    print(f"transformers: {time.time() - start:.0f} s for one step")
    their_grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return compare(args, parts, {"loss": loss.item()}, grads, their_grads, 0.9)


def lavis_model(args):
    """LAVIS's Blip2Qformer at full size around a random encoder; both saved as LAVIS would."""
    sys.path.insert(0, os.path.join(HERE, "..", "golden"))
    import lavis_files
    import lavis_tiny as tiny

    lavis_files.timm()
    tiny.import_lavis(args.lavis)
    from lavis.models.blip2_models import Qformer, blip2, blip2_qformer
    from lavis.models.clip_vit import VisionTransformer as Clip
    from lavis.models.eva_vit import VisionTransformer as Eva
    from transformers import BertConfig, BertTokenizer

    clip = "vitl" in args.recipe
    if clip:
        encoder = Clip(input_resolution=224, patch_size=14, width=1024, layers=23, heads=16, use_grad_checkpointing=False)
    else:
        encoder = Eva(img_size=224, patch_size=14, use_mean_pooling=False, embed_dim=1408, depth=39, num_heads=16, mlp_ratio=4.3637, qkv_bias=True,
                      norm_layer=lambda n: torch.nn.LayerNorm(n, eps=1e-6))
    vocab = os.path.join(args.work, "bert", "vocab.txt")

    class Full(blip2_qformer.Blip2Qformer):
        @classmethod
        def init_tokenizer(cls, *_):
            tokenizer = BertTokenizer(vocab)
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
            return tokenizer

        def init_vision_encoder(self, *_):
            return encoder, blip2.LayerNorm(encoder.num_features)

        @classmethod
        def init_Qformer(cls, queries, width, freq=2):
            config = BertConfig(vocab_size=30522, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            config.encoder_width, config.add_cross_attention, config.cross_attention_freq, config.query_length = width, True, freq, queries
            return Qformer.BertLMHeadModel(config=config), torch.nn.Parameter(torch.zeros(1, queries, config.hidden_size))

    torch.manual_seed(7)
    model = Full()
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        norm = re.search(r"(norm\w*|LayerNorm|ln_\w+)\.weight$", name)
        if name != "temp":
            parameter.data = 1 + 0.1 * noise if norm else noise * (0.05 if name.endswith("bias") else 0.5 if "embed" in name and parameter.dim() < 4 else 1 / max(parameter[0].numel(), 1) ** 0.5)
        parameter.data = parameter.data.half().float()
    model.visual_encoder.requires_grad_(False)
    bridge = {name: p for name, p in model.state_dict().items() if not name.startswith("visual_encoder.")}
    torch.save({"model": bridge}, os.path.join(args.work, "stage1.pth"))
    torch.save({name: p.half() for name, p in encoder.state_dict().items()}, os.path.join(args.work, "encoder.pth"))
    return model


def stage1(args):
    model = lavis_model(args)
    folder = os.path.join(args.work, "ours")
    shutil.rmtree(folder, ignore_errors=True)
    bridge, encoder = os.path.join(args.work, "stage1.pth"), os.path.join(args.work, "encoder.pth")
    subprocess.run([args.program, "convert", bridge, folder, "--layout", "blip2", "--vision", encoder], check=True)
    parts, grads = ours(args, {"model.vision.path": folder, "stage1.init": bridge})
    start = time.time()
    found = model({"image": pixels(), "text_input": CAPTIONS[1]})
    found["loss"].backward()
    print(f"LAVIS: {time.time() - start:.0f} s for one step")
    expected = {"loss": found["loss"].item(), "itc": found["loss_itc"].item(), "itm": found["loss_itm"].item(), "itg": found["loss_lm"].item()}
    their_grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return compare(args, parts, expected, grads, their_grads, 0.9)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--work", required=True, help="a folder for weights; stage 2 wants the model of full_size.py in its hf/")
    parser.add_argument("--program", required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--lavis", help="root of a LAVIS checkout, for stage 1")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    write_data(os.path.join(args.work, "data"), args.stage)
    write_bert(os.path.join(args.work, "bert"))
    sys.exit(0 if (stage1 if args.stage == 1 else stage2)(args) else 1)


if __name__ == "__main__":
    main()
