//! Answers to questions, and whether a caption names the thing.
//!
//! - [`normalise_answer`] and [`vqa_accuracy`] are the rules of the VQA evaluation as LAVIS applies them
//!   (punctuation, numbers as digits, articles, missing apostrophes), with its oddities: they decide published numbers.
//! - [`answers_match`] is exact match after that normalisation, on both sides: what GQA and our scenes use.
//! - [`names_noun`] is the head-noun measure: does the caption hold the noun, its plural, or a near word?
//!
//! No lemmatiser, no word vectors; the table of near words is below, whole, and short on purpose.

use super::ptb;

/// Punctuation the VQA rules know.
const PUNCTUATION: &[char] = &[
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',',
    '?', '!',
];

/// Contractions with their apostrophes. A spelling with one of them missing is mended.
const CONTRACTIONS: &[&str] = &[
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
];

/// An answer as the VQA rules compare it: `"Two dogs."` → `"2 dogs"`.
pub fn normalise_answer(answer: &str) -> String {
    let flat = answer.replace(['\n', '\t'], " ");
    digits_and_articles(&punctuation(flat.trim()))
}

/// Are two answers the same after [`normalise_answer`]?
pub fn answers_match(predicted: &str, truth: &str) -> bool {
    normalise_answer(predicted) == normalise_answer(truth)
}

/// The VQA accuracy of one question, 0 to 1: the mean over annotators of min(1, agreeing others / 3).
///
/// Like the original, truths lose punctuation only where the annotators disagree, and nothing else of them is
/// normalised. 0 without truths.
pub fn vqa_accuracy<S: AsRef<str>>(predicted: &str, truths: &[S]) -> f64 {
    let predicted = normalise_answer(predicted);
    let all_same = truths.windows(2).all(|pair| pair[0].as_ref() == pair[1].as_ref());
    let clean = |t: &S| if all_same { t.as_ref().to_string() } else { punctuation(t.as_ref()) };
    let matches: Vec<bool> = truths.iter().map(|t| clean(t) == predicted).collect();
    let agreeing = matches.iter().filter(|m| **m).count();
    let each = matches.iter().map(|own| ((agreeing - usize::from(*own)) as f64 / 3.0).min(1.0));
    if truths.is_empty() { 0.0 } else { each.sum::<f64>() / truths.len() as f64 }
}

/// Deletes or blanks punctuation: deleted where it stands beside a blank anywhere, or a digit-comma-digit exists.
fn punctuation(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let thousands =
        chars.windows(3).any(|w| w[1] == ',' && w[0].is_ascii_digit() && w[2].is_ascii_digit());
    let mut cleaned = text.to_string();
    for &mark in PUNCTUATION {
        let beside_blank = chars.windows(2).any(|w| w == [mark, ' '] || w == [' ', mark]);
        cleaned = cleaned.replace(mark, if beside_blank || thousands { "" } else { " " });
    }
    // Full stops go unless a digit follows; at most 32, for the original passes a flag as the count.
    let mut removed = 0;
    let mut result = String::with_capacity(cleaned.len());
    let mut rest = cleaned.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '.' && removed < 32 && !rest.peek().is_some_and(char::is_ascii_digit) {
            removed += 1;
        } else {
            result.push(c);
        }
    }
    result
}

fn digits_and_articles(text: &str) -> String {
    let lower = text.to_lowercase();
    let words =
        lower.split_whitespace().map(number_word).filter(|w| !matches!(*w, "a" | "an" | "the"));
    words.map(mend_contraction).collect::<Vec<_>>().join(" ")
}

fn number_word(word: &str) -> &str {
    match word {
        "none" | "zero" => "0",
        "one" => "1",
        "two" => "2",
        "three" => "3",
        "four" => "4",
        "five" => "5",
        "six" => "6",
        "seven" => "7",
        "eight" => "8",
        "nine" => "9",
        "ten" => "10",
        word => word,
    }
}

fn mend_contraction(word: &str) -> &str {
    // The original's table has this one the wrong way round.
    if word == "somebody'd" {
        return "somebodyd";
    }
    let one_missing = |whole: &str| {
        let apostrophes = whole.match_indices('\'');
        whole.len() == word.len() + 1
            && apostrophes
                .into_iter()
                .any(|(i, _)| whole[..i] == word[..i] && whole[i + 1..] == word[i..])
    };
    if !word.is_ascii() {
        return word;
    }
    CONTRACTIONS.iter().find(|whole| one_missing(whole)).copied().unwrap_or(word)
}

// ---- nouns -----------------------------------------------------------------------------------

/// Groups of words that name the same thing in a caption. A word may stand in one group only. Rules for what
/// belongs here: other names, short forms, male, female and young of an animal where a caption would say either.
/// Not: wider words (`animal` for `cat`) and not kinds (`rose` for `flower`).
const NEAR_WORDS: &[&[&str]] = &[
    // people
    &["man", "guy", "gentleman"],
    &["woman", "lady"],
    &["child", "kid", "toddler"],
    &["baby", "infant"],
    &["police officer", "policeman", "policewoman", "cop"],
    &["firefighter", "fireman"],
    &["doctor", "physician"],
    &["santa", "santa claus", "father christmas"],
    // animals
    &["dog", "puppy", "hound", "doggy"],
    &["cat", "kitten", "kitty"],
    &["chicken", "hen", "rooster", "cockerel"],
    &["chick", "baby chick"],
    &["cow", "bull", "ox", "calf", "cattle"],
    &["horse", "pony", "foal"],
    &["pig", "piglet", "hog"],
    &["sheep", "lamb", "ram", "ewe"],
    &["rabbit", "bunny", "hare"],
    &["donkey", "mule"],
    &["mouse", "rat"],
    &["turtle", "tortoise"],
    &["frog", "toad"],
    &["alligator", "crocodile"],
    &["monkey", "ape"],
    &["dove", "pigeon"],
    &["snake", "serpent"],
    &["bee", "honeybee", "bumblebee"],
    &["ladybug", "ladybird", "lady beetle"],
    &["butterfly", "moth"],
    &["dolphin", "porpoise"],
    &["seal", "sea lion"],
    &["camel", "dromedary"],
    &["raccoon", "racoon"],
    // vehicles
    &["car", "automobile", "sedan"],
    &["bicycle", "bike"],
    &["motorcycle", "motorbike"],
    &["airplane", "plane", "aeroplane", "aircraft", "jet", "airliner"],
    &["boat", "ship"],
    &["sailboat", "sailing boat", "yacht"],
    &["truck", "lorry"],
    &["fire engine", "fire truck"],
    &["train", "locomotive"],
    &["tram", "streetcar", "trolley"],
    &["subway", "metro"],
    &["taxi", "cab"],
    &["scooter", "moped"],
    // food
    &["doughnut", "donut"],
    &["fries", "french fries", "chips"],
    &["hamburger", "burger", "cheeseburger"],
    &["hot dog", "hotdog"],
    &["candy", "sweet", "lollipop"],
    &["biscuit", "cookie"],
    &["eggplant", "aubergine"],
    &["zucchini", "courgette"],
    &["corn", "maize"],
    &["pepper", "bell pepper", "paprika"],
    &["chili", "chilli", "chili pepper"],
    &["orange", "tangerine", "mandarin"],
    &["prawn", "shrimp"],
    &["soda", "soft drink", "cola"],
    // things
    &["cup", "mug"],
    &["glasses", "eyeglasses", "spectacles"],
    &["sunglasses", "shades"],
    &["television", "tv"],
    &["phone", "telephone", "cellphone", "smartphone", "mobile phone"],
    &["computer", "laptop", "pc"],
    &["sofa", "couch"],
    &["purse", "handbag"],
    &["backpack", "rucksack"],
    &["lamp", "light"],
    &["light bulb", "bulb"],
    &["flashlight", "torch"],
    &["wrench", "spanner"],
    &["shoe", "sneaker"],
    &["pants", "trousers", "jeans"],
    &["coat", "jacket"],
    &["hat", "cap"],
    &["present", "gift"],
    &["trash can", "garbage can", "dustbin", "wastebasket"],
    &["clock", "watch"],
    &["violin", "fiddle"],
    &["house", "home"],
    &["stone", "rock"],
    &["forest", "woods"],
    &["mountain", "hill", "peak"],
    &["sea", "ocean"],
    &["road", "street"],
    &["shop", "store"],
];

/// Words whose plural is not made by the rules of [`plural`]. A word that is its own plural needs no entry.
const ODD_PLURALS: &[(&str, &str)] = &[
    ("child", "children"),
    ("person", "people"),
    ("mouse", "mice"),
    ("goose", "geese"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("ox", "oxen"),
    ("cactus", "cacti"),
    ("leaf", "leaves"),
    ("loaf", "loaves"),
    ("knife", "knives"),
    ("wolf", "wolves"),
    ("calf", "calves"),
    ("half", "halves"),
    ("shelf", "shelves"),
    ("scarf", "scarves"),
    ("elf", "elves"),
    ("thief", "thieves"),
    ("potato", "potatoes"),
    ("tomato", "tomatoes"),
    ("mango", "mangoes"),
    ("volcano", "volcanoes"),
    ("hero", "heroes"),
    ("tornado", "tornadoes"),
    ("fungus", "fungi"),
    ("die", "dice"),
    ("quiz", "quizzes"),
];

/// Does the caption name `noun`: the noun itself, its plural or singular, or a near word in either number?
///
/// A noun of several words (`fire truck`) must stand in the caption as those words in a row, the last in either
/// number. Written together or with a hyphen it counts too. False for an empty noun.
pub fn names_noun(caption: &str, noun: &str) -> bool {
    let caption = open_words(caption);
    let noun = open_words(noun);
    let group =
        NEAR_WORDS.iter().find(|group| group.iter().any(|w| same_name(&open_words(w), &noun)));
    let near = group.into_iter().flat_map(|g| g.iter()).map(|w| open_words(w));
    !noun.is_empty() && std::iter::once(noun.clone()).chain(near).any(|name| holds(&caption, &name))
}

/// The words of a text, hyphens and slashes opened.
fn open_words(text: &str) -> Vec<String> {
    ptb::words(&text.replace(['-', '/'], " "))
}

fn holds(caption: &[String], name: &[String]) -> bool {
    let joined = name.concat();
    caption.windows(name.len()).any(|w| same_name(w, name))
        || caption.iter().any(|w| same_noun(w, &joined))
}

/// The same words, the last in either number.
fn same_name(a: &[String], b: &[String]) -> bool {
    match (a, b) {
        ([a @ .., last_a], [b @ .., last_b]) => a == b && same_noun(last_a, last_b),
        _ => false,
    }
}

fn same_noun(a: &str, b: &str) -> bool {
    a == b || plural(a) == b || a == plural(b)
}

/// The plural of an English noun in lower case: the odd ones by table, else by ending.
pub fn plural(noun: &str) -> String {
    if let Some((_, plural)) = ODD_PLURALS.iter().find(|(singular, _)| *singular == noun) {
        return (*plural).to_string();
    }
    // man, woman, fireman; but not human or German.
    if let Some(stem) = noun.strip_suffix("man")
        && !matches!(stem, "hu" | "ger" | "sha" | "tali" | "ro" | "otto")
    {
        return format!("{stem}men");
    }
    match noun.strip_suffix('y') {
        Some(stem) if !stem.is_empty() && !stem.ends_with(['a', 'e', 'i', 'o', 'u']) => {
            format!("{stem}ies")
        }
        _ if noun.ends_with(['s', 'x', 'z']) || noun.ends_with("ch") || noun.ends_with("sh") => {
            format!("{noun}es")
        }
        _ => format!("{noun}s"),
    }
}
