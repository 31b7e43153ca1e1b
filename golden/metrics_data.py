"""The texts of the caption-metric golden: awkward strings for the tokenizer and caption pairs.

Nothing here comes from a data set; it was written, or is put together by `scenes`, for this test.
"""

import random

STRINGS = [
    "A man riding a horse.", "Two dogs, one cat; three birds: four fish!", "What is this? A dog?", "Wait... what?!", "Really?? Yes!!", "no punctuation at all",
    "ALL CAPS SENTENCE HERE", "MiXeD CaSe Words", "  leading and trailing  ", "double  spaces   inside", "tab\tseparated\twords", "",
    "it's a dog's life", "they're don't can't won't shouldn't", "I'm you've we'll he'd she's", "the boys' bikes", "rock 'n' roll", "'tis the season", "cannot gonna wanna gotta gimme lemme",
    "o'clock at five o'clock", "y'all ain't d'you", "DON'T CAN'T IT'S", "it’s a curly apostrophe, don’t", "dogs’ bowls and James’s hat", "more'n that 'twas",
    "a \"quoted\" word", "'single quoted' words", "“curly double” and ‘curly single’", "``latex quotes''", "he said \"no.\" and left", "\"start quote", "end quote\"", "5'10\" tall", "6' tall and 12\" wide", "«guillemets» and „low quotes“",
    "a (parenthesised) remark", "brackets [square] here", "curly {braces} here", "nested (a [b {c}])", "smile :) frown :( wink ;-)", "<angle> brackets <b>bold</b>", "-lrb- already", "(unclosed",
    "1,000 people and 3.14 pies", "10,000,000 bees", "5-year-old boy", "a 2x4 board", "1/2 of a pie", "3 1/2 cups", "½ cup and ¾ full", "50% off", "$5.99 each", "US$ 100 and C$20", "£10 or €20 or ¥300", "#1 fan", "No. 5", "1st 2nd 3rd 4th", "10:30 am", "10:30am", "7 p.m. sharp", "1990s and '90s", "the '80s", "12-25-2010", "12/25/2010", "555-1234", "(555) 555-1234", "3rd-place", "24/7", "x = y + 2", "2+2=4", "-5 degrees", "98.6°F", "5kg 10lb", "mp3 h2o b2b", ".5 of it", "5. five", "1.", "1,2,3", "1, 2, 3",
    "Mr. Smith and Mrs. Jones", "Dr. Who vs. the U.S. Army", "U.S.A. flag", "e.g. this, i.e. that, etc.", "Inc. and Co. and Ltd.", "St. Louis, Mo.", "J. R. R. Tolkien", "Ph.D. student", "a.m. and p.m.", "Jan. 5 and Sept. 6", "Washington D.C.", "Main St.", "the end etc.",
    "well-known black-and-white photo", "a man - with a hat", "a man -- with a hat", "a man --- with a hat", "a man – en dash", "a man — em dash", "em—dash joined", "twenty-one one-way", "co-operate re-use e-mail", "self-", "-ish", "semi- and full-time", "x-ray t-shirt", "mother-in-law's",
    "and/or either/or", "black/white cat", "back\\slash", "under_score snake_case", "a*b *starred*", "~tilde ^caret |pipe", "at & t, AT&T, B&B, R&B", "rock & roll", "john@example.com", "http://www.example.com/page?x=1", "www.example.com", "example.com", "file.txt and image.jpg", "@user #hashtag", "C++ and C#", "a+b", "100%-cotton", "&amp; &lt; &gt; &quot;", "M&M's", "\\* \\/",
    "café naïve über façade", "Zürich São Paulo", "日本語 の テキスト", "漢字かな", "привет мир", "ελληνικά", "emoji 😀 here", "😀😀", "snow ☃ and star ★", "non\u00a0breaking space", "ellipsis… here", "dots.. two", "....", "- - -", "! ! !", ". . .", "?", ",", "'", "\"", "...", "--", ";", "a ; b",
    "trademark™ and ®registered ©2020", "bullet • point · middle", "soft\u00adhyphen", "zero\u200bwidth", "times × divide ÷", "a→b", "x² m³", "n° 5", "ﬁne ligature", "ＦＵＬＬ width",
    "isn't it? no, it isn't.", "a man's hat, a woman's bag, and the dogs' toys.", "A close-up of a person's hand (holding a cell-phone).", "the sign says \"STOP\".", "A red/blue bus; it's No. 9!", "end.", "end .", "end. Next sentence. Another", "a b c d.e f", "Hello,world", "hello.world", "hello!world?yes", "wow!!!", "a.b.c.", "i.e", "Yahoo! Inc.", "O'Neil's and McDonald's", "d'Artagnan l'amour", "a lot, alot; kinda sorta dunno", "whatcha doin' nothin'", "e'er o'er", "the 's", "s' ''", "'em get 'em",
]

# (hypothesis, references)
PAIRS = [
    ("A dog runs on the grass.", ["A dog is running on green grass.", "The dog runs across a lawn.", "A brown dog running outside."]),
    ("a cat", ["a cat sleeping on a red sofa", "a sleeping cat"]),
    ("A man riding a horse on the beach", ["A man riding a horse on the beach."]),
    ("two people walk", ["Nothing in common with that"]),
    ("", ["an empty hypothesis", "nothing was said"]),
    ("a red apple on a table", ["a red apple on a table", "a red apple on a table", "an apple"]),
    ("the the the the the the the", ["the cat is on the mat", "there is a cat on the mat"]),
    ("yellow bus", ["A yellow school bus parked on a street."]),
    ("A bowl of soup, some bread and a spoon!", ["A bowl of soup with bread.", "Soup and bread on a table; a spoon beside it."]),
    ("it's a boy's bike", ["the boy's bicycle", "It's the boy's bike."]),
    ("a a b b c c", ["a b c", "c b a", "a a b"]),
    ("A plane flies over the mountains in the blue sky.", ["An airplane flying above snowy mountains.", "A plane in a blue sky over mountains."]),
    ("a small bird sitting on a branch of a tree", ["a bird sits on a tree branch", "small bird perched on a branch", "a bird in a tree"]),
    ("a flower in a vase", ["Three flowers in a glass vase on a window sill.", "", "A vase with flowers."]),
    ("man", ["man"]),
    ("man", ["a man"]),
    ("A woman holding an umbrella in the rain.", ["A lady with an umbrella walks in the rain.", "Woman under a black umbrella, on a rainy street.", "a person in the rain", "Umbrella, rain, street"]),
    ("one two three four five six seven eight nine ten", ["ten nine eight seven six five four three two one"]),
    ("a train at a train station with people waiting for the train", ["A train at the station.", "People are waiting for a train at a station."]),
    ("A bicycle leaning against a brick wall", ["A bike leans against a wall made of brick.", "Bicycle leaning on a brick wall"]),
    ("two horses grazing in a field near a fence", ["Two horses graze in a fenced field.", "A pair of horses eating grass."]),
    ("...", ["a caption that is only punctuation", "... !"]),
    ("a boat on the water and a bridge behind the boat", ["a boat on a river under a bridge", "A boat sails near a bridge."]),
    ("The kitchen has a stove, a sink, and a refrigerator.", ["A kitchen with a stove and a sink", "A clean kitchen with a refrigerator"]),
    ("a pizza with cheese and tomatoes on a plate", ["A pizza topped with cheese and tomato on a white plate.", "A cheese pizza."]),
]

NOUNS = ["dog", "cat", "car", "tree", "apple", "bird", "boat", "flower", "house", "horse"]
COLOURS = ["red", "green", "blue", "yellow", "black"]
PLACES = ["to the left of", "to the right of", "above", "below", "near"]


def scenes(count, seed):
    """`count` generated pairs: references vary in wording, hypotheses err at random."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        a, b, c, d, place = rng.choice(NOUNS), rng.choice(NOUNS), rng.choice(COLOURS), rng.choice(COLOURS), rng.choice(PLACES)
        references = [f"A {c} {a} {place} a {d} {b}.", f"There is a {c} {a} {place} a {b}.", f"a {a} and a {d} {b}, side by side"]
        wrong = (rng.choice(NOUNS), rng.choice(COLOURS))
        hypothesis = rng.choice([references[0], f"a {wrong[1]} {a} {place} a {d} {b}", f"a {wrong[0]} {place} a {wrong[1]} {b}", f"{c} {a}", f"there is a {a} and a {wrong[0]} and a {b}"])
        found.append((hypothesis, references[: rng.randint(1, 3)]))
    return found
