"""Golden of stage 1: the three losses of LAVIS' Blip2Qformer and every gradient.

Weights: blip2_tiny.safetensors. The drawing of hard negatives is replaced by
given draws, first one image per text (from the text-to-image weights), then one
text per image. Similarities are stored as they enter the contrastive loss
(maximum over queries, divided by the temperature), before the diagonal is masked.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

import lavis_tiny as tiny
from common import arguments, write_tensors

LENGTHS = (3, 10, 6, 14)  # the last one is truncated
IMAGE_IDS = (7, 3, 7, 5)  # pictures 0 and 2 are the same one


class RecordingFunctional:
    """torch.nn.functional, keeping a copy of what enters each cross-entropy."""

    def __init__(self):
        self.inputs = []

    def __getattr__(self, name):
        return getattr(F, name)

    def cross_entropy(self, logits, *args, **kwargs):
        self.inputs.append(logits.detach().clone())
        return F.cross_entropy(logits, *args, **kwargs)


@contextmanager
def fixed_draws(draws):
    """Replace torch.multinomial by the given rows; yields the list of weights it was asked with."""
    asked, rest, original = [], list(draws), torch.multinomial

    def draw(weights, count):
        asked.append(weights.detach().clone())
        index = rest.pop(0)
        assert count == 1 and weights[index] > 0, "a draw of weight zero"
        return torch.tensor([index])

    torch.multinomial = draw
    try:
        yield asked
    finally:
        torch.multinomial = original
    assert not rest


def step(model, samples, draws):
    """(output, recorded cross-entropy inputs, multinomial weights) of one forward pass."""
    from lavis.models.blip2_models import blip2_qformer

    blip2_qformer.F = RecordingFunctional()
    with fixed_draws(draws) as asked:
        output = model(samples)
    return output, blip2_qformer.F.inputs, asked


def main():
    args = arguments(__doc__, lavis="root of a LAVIS checkout at " + tiny.COMMIT)
    model = tiny.stage1_model(args.lavis)
    image, text = tiny.features(11, 4), tiny.texts(12, LENGTHS)
    draws = [2, 3, 0, 1, 3, 0, 1, 0]
    tokens = model.tokenizer(text, max_length=tiny.CONFIG["max_txt_len"])
    output, entropies, asked = step(model, {"image": image, "text_input": text}, draws)
    output.loss.backward()
    tensors = {"image": image, "ids": tokens.input_ids, "mask": tokens.attention_mask,
               "draws_image": torch.tensor(draws[:4]), "draws_text": torch.tensor(draws[4:]),
               "weights_t2i": torch.stack(asked[:4]), "weights_i2t": torch.stack(asked[4:]),
               "sim_i2t": entropies[0], "sim_t2i": entropies[1], "itm_logits": entropies[2]}
    tensors |= {name: output[name] for name in ("loss", "loss_itc", "loss_itm", "loss_lm")}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias shifts all scores of a row alike: its gradient is zero up to rounding.
        assert "key.bias" in name or parameter.grad.abs().max() > 1e-6, name
        tensors["grad." + name] = parameter.grad

    # Known pictures: soft targets over equal ids, and no negatives among them.
    ids = torch.tensor(IMAGE_IDS)
    known_draws = [1, 0, 3, 2, 3, 2, 1, 0]
    output, entropies, asked = step(model, {"image": image, "text_input": text, "image_id": ids}, known_draws)
    tensors |= {"image_id": ids, "image_id.draws_image": torch.tensor(known_draws[:4]), "image_id.draws_text": torch.tensor(known_draws[4:]),
                "image_id.weights_t2i": torch.stack(asked[:4]), "image_id.weights_i2t": torch.stack(asked[4:])}
    tensors |= {f"image_id.{name}": output[name] for name in ("loss", "loss_itc", "loss_itm", "loss_lm")}
    print({k: round(v.item(), 6) for k, v in tensors.items() if "loss" in k})
    write_tensors(args, "stage1", tensors, **tiny.header())


if __name__ == "__main__":
    main()
