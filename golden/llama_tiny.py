"""Two tiny random LLaMA models for the stage-2 and generation goldens.

Grouped-query attention, half-split rotary positions, untied head, transformers'
tensor names. The rows of the end tokens in the head are enlarged so that some
sequences end early. Run as a script it writes llama_tiny.safetensors (vocabulary
67, prefix `small.`; vocabulary 301, prefix `wide.`) with a forward pass of each.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import arguments, versions, write_tensors

BOS, EOS, PAD, OTHER_EOS = 1, 2, 0, 11
SEEDS = {"small": 30, "wide": 16}
VOCABULARY = {"small": 67, "wide": 301}
SHAPE = dict(hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
             rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=128, hidden_act="silu", tie_word_embeddings=False)


def build(name):
    """The model `small` or `wide`, frozen, in eval mode."""
    config = LlamaConfig(vocab_size=VOCABULARY[name], bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, **SHAPE)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(SEEDS[name])
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "norm" in key else noise * (1 if "embed" in key else 1.3 / parameter.shape[-1] ** 0.5)
    model.lm_head.weight.data[[EOS, OTHER_EOS]] *= 2.0
    return model


def header():
    return dict(versions=versions("torch", "transformers"), shape=SHAPE, vocabulary=VOCABULARY, seeds=SEEDS,
                ids=dict(bos=BOS, eos=EOS, pad=PAD, other_eos=OTHER_EOS))


def main():
    args = arguments(__doc__)
    tensors = {}
    for name in SEEDS:
        model = build(name)
        ids = torch.randint(3, VOCABULARY[name], (2, 9), generator=torch.Generator().manual_seed(50))
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        tensors |= {f"{name}.{key}": value for key, value in model.state_dict().items()}
        tensors |= {f"forward.{name}.ids": ids, f"forward.{name}.logits": output.logits}
        tensors |= {f"forward.{name}.hidden.{i}": value for i, value in enumerate(output.hidden_states)}
    write_tensors(args, "llama_tiny", tensors, **header())


if __name__ == "__main__":
    main()
