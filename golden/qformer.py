"""Golden of the Q-Former's passes: query-only, text-only, joint (ITM) and captioning (ITG).

Weights: blip2_tiny.safetensors (LAVIS names). Captioning is run twice, from the
cached keys and values of the query pass (causal mask over text) and in the full
form with the queries in the sequence; the script checks that both agree.
`hidden.N` is the input of layer N, the last one the output.
"""

import torch
import torch.nn.functional as F

import lavis_tiny as tiny
from common import arguments, write_tensors

LENGTHS = (3, 9)  # one text ends in padding, the other almost fills the row


def passes(model, image, tokens):
    """All outputs by name; `model` is the tiny stage-1 model."""
    bert, queries = model.Qformer.bert, model.query_tokens.expand(len(image), -1, -1)
    seen = model.ln_vision(image)
    encoder = dict(encoder_hidden_states=seen, encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long))
    common = dict(output_hidden_states=True, return_dict=True)
    both = torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), tokens.attention_mask], 1)

    query = bert(query_embeds=queries, use_cache=True, **encoder, **common)
    text = bert(tokens.input_ids, attention_mask=tokens.attention_mask, **common)
    joint = bert(tokens.input_ids, query_embeds=queries, attention_mask=both, **encoder, **common)

    inputs = tokens.input_ids.clone()
    inputs[:, 0] = tiny.DEC
    labels = inputs.masked_fill(inputs == tiny.PAD, -100)
    cached = model.Qformer(inputs, attention_mask=both, past_key_values=query.past_key_values, labels=labels, **common)
    full = model.Qformer(inputs, query_embeds=queries, attention_mask=both, labels=labels, **encoder, **common)
    seen_rows = tokens.attention_mask.bool()
    torch.testing.assert_close(cached.logits[seen_rows], full.logits[seen_rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached.loss, full.loss)

    found = {"itg_inputs": inputs, "itg_labels": labels}
    for name, output in dict(query=query, text=text, joint=joint, itg=cached, itg_full=full).items():
        found |= {f"{name}.hidden.{i}": value for i, value in enumerate(output.hidden_states)}
    for i, (key, value) in enumerate(query.past_key_values):
        found |= {f"cache.{i}.key": key, f"cache.{i}.value": value}
    found |= {"itg.logits": cached.logits, "itg_full.logits": full.logits, "itg.loss": cached.loss}
    # Zero where the label is ignored; the mean over the others is itg.loss.
    found["itg.token_loss"] = F.cross_entropy(cached.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", label_smoothing=0.1)
    found["image_features"] = F.normalize(model.vision_proj(query.last_hidden_state), dim=-1)
    found["text_features"] = F.normalize(model.text_proj(text.last_hidden_state[:, 0]), dim=-1)
    found["itm.logits"] = model.itm_head(joint.last_hidden_state[:, : queries.shape[1]]).mean(1)
    return found


def main():
    args = arguments(__doc__, lavis="root of a LAVIS checkout at " + tiny.COMMIT)
    model = tiny.stage1_model(args.lavis).eval()
    image = tiny.features(1, len(LENGTHS))
    tokens = model.tokenizer(tiny.texts(2, LENGTHS), max_length=tiny.CONFIG["max_txt_len"])
    with torch.no_grad():
        found = passes(model, image, tokens)
    tensors = {"image": image, "ids": tokens.input_ids, "mask": tokens.attention_mask, **found}
    write_tensors(args, "qformer", tensors, **tiny.header())


if __name__ == "__main__":
    main()
