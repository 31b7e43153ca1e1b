"""Golden of caption scores: pycocoevalcap's tokens, BLEU-1..4, ROUGE-L and CIDEr-D.

Java must be installed. Scores are taken over pycocoevalcap's own tokens, for the
whole list and for each item, on three corpora (a single pair among them, where
every document frequency is one and CIDEr is zero).
"""

import os
import warnings

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from common import arguments, versions, write_json
from metrics_data import PAIRS, STRINGS, scenes


def tokenise(texts):
    """One token string per text; the wrapper wants {id: [{"caption": text}]}."""
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    return [found[i][0] for i in range(len(texts))]


def corpus(name, pairs):
    hypotheses = tokenise([h for h, _ in pairs])
    flat = iter(tokenise([r for _, references in pairs for r in references]))
    references = [[next(flat) for _ in refs] for _, refs in pairs]
    gts, res = dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)}
    bleu, bleus = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouges = Rouge().compute_score(gts, res)
    cider, ciders = Cider().compute_score(gts, res)
    items = []
    for i, (hypothesis, raw) in enumerate(pairs):
        items.append({"hypothesis": hypothesis, "references": raw, "hypothesis_tokens": hypotheses[i], "reference_tokens": references[i],
                      "bleu": [float(b[i]) for b in bleus], "rouge_l": float(rouges[i]), "cider_d": float(ciders[i])})
    print(name, len(items), bleu, rouge, cider)
    return {"name": name, "bleu": [float(b) for b in bleu], "rouge_l": float(rouge), "cider_d": float(cider), "items": items}


def main():
    # Java before 18 reads files in the locale's encoding.
    os.environ["JAVA_TOOL_OPTIONS"] = "-Dfile.encoding=UTF-8"
    warnings.simplefilter("error")
    args = arguments(__doc__)
    assert not any(c in text for text in STRINGS for c in "\n\r\u0085\u2028\u2029"), "one line each"
    tokens = [{"text": text, "tokens": result} for text, result in zip(STRINGS, tokenise(STRINGS), strict=True)]
    corpora = [corpus("handwritten", PAIRS), corpus("scenes", scenes(40, 5)), corpus("single", PAIRS[:1])]
    write_json(args, "metrics", {"versions": versions("pycocoevalcap", "numpy"), "tokenizer": tokens, "corpora": corpora})


if __name__ == "__main__":
    main()
