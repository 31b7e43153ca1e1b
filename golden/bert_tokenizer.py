"""Golden of the Q-Former's tokenizer: transformers' BertTokenizer (uncased) on awkward strings.

Two entries per string: all ids with [CLS] and [SEP], and the fixed-length form
the training uses (32 tokens, cut on the right, padded). [DEC] is added as LAVIS
does, so that it is one token in text.
"""

from transformers import BertTokenizer

from common import arguments, versions, write_json

STRINGS = [
    "", " ", "a dog", "A Dog Runs.", "a photo of a cat sitting on a red sofa", "Don't you think it's fine?", "naïve café façade Ångström", "e\u0301clair Z\u0308urich", "İstanbul ß ﬁ ǅ",
    "日本語のテキスト", "中文字符，标点。", "한국어 텍스트", "привет мир Ёлка", "مرحبا بالعالم", "हिन्दी पाठ", "ไทย", "😀 smile 👩‍👩‍👧", "x²+y³=½", "Ⅷ №5 ™",
    "1,000.50 $5.99 50% #1", "http://example.com/a?b=c_d", "well-known black-and-white", "(brackets) [square] {curly} <b>", "“curly” ‘quotes’ — dash – en … dots", "tabs\tand\nnewlines\r\nhere", "zero\u200bwidth \u00adsoft \ufeffbom", "non\u00a0breaking\u3000wide\u2028line",
    "control\u0000\u0001\u007f\ufffdchars", "supercalifragilisticexpialidocious", "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis", "x" * 100, "x" * 101, "é" * 101, "qzxv wkjq",
    "[MASK] is here", "a [MASK].", "[CLS] [SEP] [PAD] [UNK]", "[mask] [Mask]", "[DEC] a caption", "[dec]", "[unused1] [unused99]", "##ing ing ##", "a[MASK]b", "[MASK][MASK]", "[ MASK ]",
    "word " * 40, "the quick brown fox jumps over the lazy dog " * 2 + "until it stops", "ALLCAPS MiXeD", "a.b.c e.g. i.e. U.S.A.", "~`!@#$%^&*()_+-=|\\;:'\",<.>/?", "𝒜 𝔅 mathematical", "ﷺ", "Ⓐⓑ", "\U000e0001tag",
]


def main():
    args = arguments(__doc__, bert_vocab="vocab.txt of bert-base-uncased (30522 lines)")
    tokenizer = BertTokenizer(args.bert_vocab, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    strings = []
    for text in STRINGS:
        fixed = tokenizer(text, padding="max_length", truncation=True, max_length=32)
        ids = tokenizer(text).input_ids
        strings.append({"text": text, "ids": ids, "ids_32": fixed.input_ids, "length_32": sum(fixed.attention_mask), "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    write_json(args, "bert_tokenizer", {"versions": versions("transformers"), "vocab_sha256": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                                        "dec_id": tokenizer.bos_token_id, "size": len(tokenizer), "strings": strings})


if __name__ == "__main__":
    main()
