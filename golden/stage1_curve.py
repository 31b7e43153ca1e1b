"""Golden of ten stage-1 training steps with AdamW, from LAVIS' model and parameter groups.

Start: blip2_tiny.safetensors. Four fixed batches in turn, given negative draws,
constant learning rate, no clipping. The same run in f64 gives the spread that
f32 rounding alone causes; it is in the header. Key biases are no part of the
result: their gradient is zero up to rounding, which AdamW turns into noise.
"""

import copy
import types

import torch

import lavis_tiny as tiny
from common import arguments, write_tensors
from stage1 import step

STEPS, BATCHES, BATCH = 10, 4, 4
OPTIMISER = dict(lr=1e-3, betas=(0.9, 0.98), eps=1e-8)
WEIGHT_DECAY = 0.05
LENGTHS = ((3, 10, 6, 14), (5, 4, 11, 7), (9, 2, 8, 3), (10, 6, 4, 12))


def batches():
    return [(tiny.features(100 + i, BATCH), tiny.texts(200 + i, LENGTHS[i])) for i in range(BATCHES)]


def draws():
    """(STEPS, 8) rows other than the own one: four images for the texts, then four texts for the images."""
    shift = torch.randint(1, BATCH, (STEPS, 2 * BATCH), generator=torch.Generator().manual_seed(300))
    return (torch.arange(BATCH).repeat(2) + shift) % BATCH


def train(model, data):
    """(STEPS, 4) losses: total, ITC, ITM, ITG."""
    optimiser = torch.optim.AdamW(model.get_optimizer_params(WEIGHT_DECAY), **OPTIMISER)
    losses = []
    for i, rows in enumerate(draws().tolist()):
        image, text = data[i % BATCHES]
        output, _, _ = step(model, {"image": image.to(model.temp.dtype), "text_input": text}, rows)
        losses.append(torch.stack([output[k].detach() for k in ("loss", "loss_itc", "loss_itm", "loss_lm")]))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    return torch.stack(losses)


def norms(model):
    return {f"norm.{n}": p.norm() for n, p in model.named_parameters() if "key.bias" not in n}


def main():
    args = arguments(__doc__, lavis="root of a LAVIS checkout at " + tiny.COMMIT)
    model, data = tiny.stage1_model(args.lavis), batches()
    exact = copy.deepcopy(model).double()
    # LAVIS' own layer norm of the features insists on f32.
    exact.ln_vision.forward = types.MethodType(torch.nn.LayerNorm.forward, exact.ln_vision)
    no_decay = [n for n, p in model.named_parameters() if any(p is q for g in model.get_optimizer_params(WEIGHT_DECAY) if g["weight_decay"] == 0 for q in g["params"])]
    losses, exact_losses = train(model, data), train(exact, data)
    tensors = {"losses": losses, "draws_image": draws()[:, :BATCH], "draws_text": draws()[:, BATCH:]} | norms(model)
    for i, (image, text) in enumerate(data):
        tokens = model.tokenizer(text, max_length=tiny.CONFIG["max_txt_len"])
        tensors |= {f"batch.{i}.image": image, f"batch.{i}.ids": tokens.input_ids, f"batch.{i}.mask": tokens.attention_mask}
    spread = ((losses - exact_losses) / exact_losses).abs().max().item()
    norm_spread = max(((norms(exact)[k] - v) / v).abs().item() for k, v in norms(model).items())
    print(losses, f"f32 against f64: losses {spread:.1e}, norms {norm_spread:.1e}; {len(no_decay)} tensors without decay")
    write_tensors(args, "stage1_curve", tensors, optimiser=OPTIMISER, weight_decay=WEIGHT_DECAY, no_decay=no_decay,
                  f64_relative_difference=dict(losses=spread, norms=norm_spread), **tiny.header())


if __name__ == "__main__":
    main()
