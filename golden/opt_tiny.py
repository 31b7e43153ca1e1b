"""Two tiny random OPT models: pre-norm, and post-norm with words narrower than the model, as OPT-350m.

transformers' tensor names, prefixes `pre.` and `post.`; the forward pass of a batch with padding on the left.
"""

import torch
from transformers import OPTConfig, OPTForCausalLM

from common import arguments, versions, write_tensors

SHAPE = dict(vocab_size=53, hidden_size=27, ffn_dim=40, num_hidden_layers=3, num_attention_heads=3, max_position_embeddings=30)
CASES = {
    "pre": dict(do_layer_norm_before=True, word_embed_proj_dim=27),
    "post": dict(do_layer_norm_before=False, word_embed_proj_dim=14),
}


def main():
    args = arguments(__doc__)
    tensors = {}
    for seed, (name, case) in enumerate(CASES.items()):
        config = OPTConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1, **SHAPE, **case)
        config._attn_implementation = "eager"
        model = OPTForCausalLM(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in key and key.endswith("weight")
            parameter.data = 1 + 0.2 * noise if norm else noise * 1.3 / max(parameter.shape[-1], 1) ** 0.5
        ids = torch.randint(3, SHAPE["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(9))
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        ids[1, :3] = 1
        logits = model(ids, attention_mask=mask).logits
        own = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
        tensors |= {f"{name}.{key}": value for key, value in own.items()}
        tensors |= {f"forward.{name}.{key}": value for key, value in dict(ids=ids, mask=mask, logits=logits).items()}
    write_tensors(args, "opt_tiny", tensors, versions=versions("torch", "transformers"), shape=SHAPE, cases=CASES)


if __name__ == "__main__":
    main()
