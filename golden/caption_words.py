"""Golden of the caption tokenizer: what pycocoevalcap 1.2 counts in 400 made-up captions.

Java must be installed. The captions are put together by a seeded generator from ordinary caption words and from
what makes tokenizers stumble: contractions, abbreviations, numbers, brackets, quotes, hyphens, slashes. Each is
followed by a neutral one, for the Java program lets the end of a line depend on the next line.

Run: python golden/caption_words.py [--out FILE]
"""

import argparse
import importlib.metadata
import json
import os
import random

from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

WORDS = (
    "a an the man woman dog cat sitting on of in with red blue and is riding bike standing next to holding his her it "
    "plate food table street people two three young girl wearing shirt black white large field water train car photo "
    "clock tower sign says stop reads it's don't isn't man's dogs' can't woman's cannot they're THEY'RE o'clock t-shirt "
    "close-up black-and-white U.S. St. Mr. Dr. vs. etc. p.m. a.m. e.g. no. No. Inc. Jan. Mass. 5 10 12 100 1,000 3.5 1/2 "
    "5:30 1950s '80s 90's 2nd $5 £5 50% #1 7-eleven coca-cola McDonald's A B C I & AT&T R&B @ and/or his/her w/ 6' café "
    "naïve TV T.V. :) ;-) ... … – — 3D 4x4 B-52 'n' y'all gonna wanna ma'am 'em o'brien jalapeño #tag @user www.a.org "
    "(555) 1_2 -5 +5 C++ x=y ½ ° 30°C ½-inch &amp; <b> ** * ~ 😀 ❤ 日本 don’t “big” ‘small’ plan end.Another hello!world"
).split()
ENDS = ["", "", ".", ".", ".", " .", "!", "?", "..."]


def caption(rng):
    words = []
    for _ in range(rng.randint(3, 12)):
        word, other, kind = rng.choice(WORDS), rng.choice(WORDS), rng.random()
        if kind < 0.06:
            word += rng.choice([",", ".", ";", ":", "!", "?", "...", " -", " --"])
        elif kind < 0.09:
            word = f'"{word}"'
        elif kind < 0.11:
            word = f"'{word}'"
        elif kind < 0.13:
            word = f"({word})"
        elif kind < 0.14 and word.isalnum() and other.isalnum():
            word += rng.choice("-/") + other
        elif kind < 0.18:
            word = rng.choice([str.upper, str.capitalize])(word)
        elif kind < 0.20:
            word += "'s"
        words.append(word)
    return " ".join(words) + rng.choice(ENDS)


def main():
    os.environ["JAVA_TOOL_OPTIONS"] = "-Dfile.encoding=UTF-8"
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=os.path.join(here, "caption_words.json"))
    rng = random.Random(20)
    texts = [caption(rng) for _ in range(400)]
    lines = [line for text in texts for line in (text, "zz")]
    found = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    pairs = [[text, found[2 * i][0]] for i, text in enumerate(texts)]
    with open(parser.parse_args().out, "w", encoding="utf-8") as file:
        file.write('{"pycocoevalcap": "%s", "captions": [\n' % importlib.metadata.version("pycocoevalcap"))
        file.write(",\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs) + "\n]}\n")


if __name__ == "__main__":
    main()
