//! Captions: from titles and labels to natural lower-case phrases; articles, plurals, head nouns.
//!
//! English only, and only what labels of things need. No model, no dictionary: short lists and rules.

/// The reference's caption normaliser: lower case, `. ! " ( ) * # : ; ~` become spaces, runs of
/// spaces collapse, at most `max_words` words.
pub fn pre_caption(caption: &str, max_words: usize) -> String {
    let lower = caption.to_lowercase();
    let spaced: String =
        lower.chars().map(|c| if ".!\"()*#:;~".contains(c) { ' ' } else { c }).collect();
    // Single spaces, tabs and newlines inside count as the reference counts them: runs of two and
    // more white-space characters become one space; the ends are stripped.
    let words: Vec<&str> = spaced.split_whitespace().take(max_words).collect();
    words.join(" ")
}

const ARTICLES: &[&str] = &["a", "an", "the"];
const NUMBERS: &[&str] = &[
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "some",
    "several",
];
/// Where a noun phrase's head ends.
const STOPS: &[&str] = &[
    "of", "with", "in", "on", "at", "from", "for", "and", "to", "by", "under", "over", "near",
    "behind", "inside", "into", "without", "through", "above", "below", "between", "beside", "as",
    "worn", "holding", "wearing", "riding", "playing", "covered", "hatched", "made", "like",
    "that", "who", "is", "against", "around", "or", "out",
];
/// "a bunch of grapes" shows grapes; "a cup of tea" shows a cup.
const MEASURES: &[&str] = &[
    "pair",
    "bunch",
    "cluster",
    "couple",
    "slice",
    "piece",
    "head",
    "string",
    "set",
    "group",
    "herd",
    "flock",
    "plant",
    "ball",
    "ear",
    "sprig",
    "pile",
    "stack",
    "bouquet",
    "quarter",
    "half",
    "bar",
    "loaf",
    "stick",
    "drop",
    "flock",
    "pack",
    "collection",
    "bits",
    "outline",
    "silhouette",
    "handful",
    "lump",
    "row",
];
/// Nouns that take no article.
const MASS: &[&str] = &[
    "rice",
    "bread",
    "corn",
    "hair",
    "confetti",
    "money",
    "soap",
    "butter",
    "honey",
    "milk",
    "water",
    "pasta",
    "spaghetti",
    "lettuce",
    "garlic",
    "broccoli",
    "ginger",
    "bacon",
    "cheese",
    "salt",
    "fire",
    "fog",
    "bamboo",
    "food",
    "ice",
    "sake",
    "curry",
    "soup",
    "popcorn",
    "luggage",
    "lightning",
    "yarn",
    "thread",
    "dna",
    "wind",
    "snow",
    "rain",
    "smoke",
    "wool",
    "paper",
    "jewelry",
    "furniture",
    "grass",
    "sand",
    "wood",
    "oil",
    "ink",
    "paint",
    "salami",
    "lasagna",
    "fondue",
    "lemonade",
    "coffee",
    "tea",
    "wine",
    "beer",
    "toast",
    "parsley",
    "algae",
    "knitting",
    "measuring tape",
    "equipment",
    "makeup",
    "nail polish",
    "shaved ice",
    "saturn",
    "jupiter",
    "mars",
    "venus",
    "pluto",
    "neptune",
    "uranus",
    "stonehenge",
    "sushi",
    "sashimi",
    "tofu",
    "juggling",
    "hopscotch",
    "ramen",
    "camping",
    "bowling",
    "swimming",
    "hard candy",
    "mount fuji",
];
/// Words in -s that are no plurals.
const SINGULAR_S: &[&str] = &[
    "bus",
    "cactus",
    "octopus",
    "hippopotamus",
    "platypus",
    "compass",
    "glass",
    "dress",
    "iris",
    "walrus",
    "circus",
    "abacus",
    "syllabus",
    "virus",
    "mattress",
    "cross",
    "grass",
    "canvas",
    "atlas",
    "lens",
    "tennis",
    "gas",
    "chess",
    "bass",
    "moss",
    "brass",
    "hibiscus",
    "crocus",
    "lotus",
    "eyeglass",
    "waitress",
    "actress",
    "princess",
    "goddess",
    "boss",
    "fortress",
    "cutlass",
    "species",
    "series",
    "santa claus",
    "claus",
    "mistress",
    "triceratops",
    "tyrannosaurus",
    "rhinoceros",
];
/// Things that are pairs or many: plural words without a final s, and plural-only nouns.
const PLURALS: &[&str] = &[
    "men",
    "women",
    "people",
    "children",
    "feet",
    "teeth",
    "mice",
    "geese",
    "sheep pair",
    "dice",
    "police",
    "lungs",
    "cattle",
    "jeans",
    "pants",
    "dominoes",
];
const IRREGULAR: &[(&str, &str)] = &[
    ("man", "men"),
    ("woman", "women"),
    ("child", "children"),
    ("person", "people"),
    ("mouse", "mice"),
    ("goose", "geese"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("ox", "oxen"),
    ("leaf", "leaves"),
    ("knife", "knives"),
    ("wolf", "wolves"),
    ("loaf", "loaves"),
    ("calf", "calves"),
    ("shelf", "shelves"),
    ("half", "halves"),
    ("scarf", "scarves"),
    ("thief", "thieves"),
    ("elf", "elves"),
    ("sheep", "sheep"),
    ("deer", "deer"),
    ("fish", "fish"),
    ("bison", "bison"),
    ("moose", "moose"),
    ("salmon", "salmon"),
    ("shrimp", "shrimp"),
    ("squid", "squid"),
    ("trout", "trout"),
    ("aircraft", "aircraft"),
    ("spacecraft", "spacecraft"),
    ("cactus", "cacti"),
    ("tomato", "tomatoes"),
    ("potato", "potatoes"),
    ("mango", "mangoes"),
    ("volcano", "volcanoes"),
    ("hero", "heroes"),
    ("die", "dice"),
    ("wapiti", "wapiti"),
    ("mosquito", "mosquitoes"),
    ("buffalo", "buffaloes"),
];

/// Does the noun look like a plural?
pub fn is_plural(word: &str) -> bool {
    if SINGULAR_S.contains(&word) || word.ends_with("ss") || word.ends_with("us") {
        return false;
    }
    PLURALS.contains(&word) || (word.ends_with('s') && word.len() > 3 && !word.ends_with("is"))
}

/// "a" or "an" before `word`, by sound as far as spelling tells.
pub fn article(word: &str) -> &'static str {
    const AN: [&str; 4] = ["hour", "honest", "x-ray", "f-22"];
    const A: [&str; 12] = [
        "uni", "use", "user", "ufo", "euro", "one", "ukulele", "unicycle", "uk ", "u-", "usb",
        "ewe",
    ];
    if AN.iter().any(|p| word.starts_with(p)) {
        return "an";
    }
    if A.iter().any(|p| word.starts_with(p)) {
        return "a";
    }
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

/// The phrase without a leading article.
pub fn strip_article(phrase: &str) -> &str {
    match phrase.split_once(' ') {
        Some((first, rest)) if ARTICLES.contains(&first) => rest,
        _ => phrase,
    }
}

/// "red apple" → "a red apple"; plurals, masses and phrases with a determiner stay as they are.
pub fn with_article(phrase: &str) -> String {
    let first = phrase.split(' ').next().unwrap_or_default();
    if ARTICLES.contains(&first) || NUMBERS.contains(&first) || first.ends_with("'s") {
        return phrase.to_owned();
    }
    let head = head_of(phrase, false);
    let tail = phrase.split(' ').take(head.0 + 1).collect::<Vec<_>>().join(" ");
    let mass = MASS.contains(&head.1.as_str())
        || MASS.iter().any(|m| tail.ends_with(m) && m.contains(' '));
    if mass || is_plural(&head.1) {
        return phrase.to_owned();
    }
    format!("{} {phrase}", article(first))
}

/// Index and text of the head word; `through` looks through "a bunch of".
fn head_of(phrase: &str, through: bool) -> (usize, String) {
    let words: Vec<&str> = phrase.split(' ').collect();
    let start = usize::from(words.len() > 1 && ARTICLES.contains(&words[0]));
    let is_stop = |i: usize| {
        let w = words[i];
        // "a red and white flower" goes on.
        if w == "and" && COLOUR_WORDS.contains(&words[i - 1]) && i + 2 < words.len() {
            return false;
        }
        // "man running": the head ends before the participle; "running shoe" begins with it.
        STOPS.contains(&w)
            || (w.ends_with("ing")
                && w.len() > 4
                && i > start
                && PERSONS.contains(&words[i - 1])
                && w != "building")
    };
    let mut end = start + 1;
    while end < words.len() && !is_stop(end) {
        end += 1;
    }
    let head = words[end - 1];
    let measured =
        through && end + 1 < words.len() && words[end] == "of" && MEASURES.contains(&head);
    if measured {
        let rest = words[end + 1..].join(" ");
        let (i, inner) = head_of(&rest, true);
        return (end + 1 + i, inner);
    }
    (end - 1, head.trim_end_matches([',', '\'']).to_owned())
}

const COLOUR_WORDS: &[&str] = &[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white",
];

/// Whom participles follow: "a woman swimming".
const PERSONS: &[&str] = &[
    "man",
    "woman",
    "person",
    "people",
    "men",
    "women",
    "boy",
    "girl",
    "child",
    "baby",
    "dog",
    "cat",
    "bear",
    "spider",
    "face",
    "monkey",
    "bird",
    "horse",
    "penguin",
    "astronaut",
    "merman",
    "kid",
    "couple",
    "hand",
    "fish",
    "cow",
    "lizard",
    "squirrel",
    "raccoon",
    "owl",
    "lion",
];

/// The head noun: "a sumatran tiger in the snow" → "tiger", "a bunch of grapes" → "grapes".
pub fn head_noun(phrase: &str) -> String {
    head_of(phrase, true).1
}

/// What a caption is about: the phrase without its article. Pictures of one concept share a split.
pub fn concept(phrase: &str) -> String {
    strip_article(phrase).to_owned()
}

/// The plural of a noun phrase without article: "red apple" → "red apples".
pub fn plural(phrase: &str) -> String {
    let (lead, noun) = phrase.rsplit_once(' ').map_or(("", phrase), |(l, n)| (l, n));
    let irregular = |n: &str| {
        IRREGULAR.iter().find(|(one, _)| *one == n).map(|(_, many)| (*many).to_owned()).or_else(
            || {
                // "policeman" → "policemen", "starfish" → "starfish"
                let (stem, many) = n
                    .strip_suffix("woman")
                    .map(|s| (s, "women"))
                    .or_else(|| n.strip_suffix("man").map(|s| (s, "men")))
                    .or_else(|| n.strip_suffix("fish").map(|s| (s, "fish")))?;
                (n != "human" && n != "german").then(|| format!("{stem}{many}"))
            },
        )
    };
    let many = irregular(noun).unwrap_or_else(|| {
        let before = noun.chars().rev().nth(1);
        if noun.ends_with(['s', 'x', 'z']) || noun.ends_with("ch") || noun.ends_with("sh") {
            format!("{noun}es")
        } else if noun.ends_with('y') && before.is_some_and(|c| !"aeiou".contains(c)) {
            format!("{}ies", &noun[..noun.len() - 1])
        } else {
            format!("{noun}s")
        }
    });
    if lead.is_empty() { many } else { format!("{lead} {many}") }
}

/// Can scenes count it? "a red apple" can; "hair", "a cup of tea", "a man running" can't.
pub fn is_plain_thing(phrase: &str) -> bool {
    let Some((first, rest)) = phrase.split_once(' ') else { return false };
    let words: Vec<&str> = rest.split(' ').collect();
    (first == "a" || first == "an")
        && words.len() <= 3
        && rest.chars().all(|c| c.is_ascii_lowercase() || c == ' ' || c == '-')
        && !words.iter().any(|w| STOPS.contains(w) || NUMBERS.contains(w) || w.ends_with("'s"))
        && head_of(phrase, false).0 == words.len()
        && words.last().is_some_and(|w| !is_plural(w) && !w.ends_with("ing"))
}

/// `count` in words, for 0 to 10.
pub fn number(count: usize) -> &'static str {
    const WORDS: [&str; 11] =
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    WORDS.get(count).copied().unwrap_or("many")
}

/// Joins "a cat", "a dog", "a ball" with commas and "and".
pub fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [head @ .., last] => format!("{} and {last}", head.join(", ")),
    }
}

/// A title made by a person → a phrase, or `None` when it is no caption: set names, addresses,
/// credits, numbers, other scripts, too long or too short.
pub fn clean_title(title: &str) -> Option<String> {
    let lower = title.to_lowercase();
    let refuse =
        ["@", "http", "www.", "clipart", "openclipart", "sibmission", "submission", ".svg"];
    if refuse.iter().any(|r| lower.contains(r)) || lower.starts_with("by ") {
        return None;
    }
    // What stands in brackets is about the file: (B and W), (Half Slice) is kept as words would be worse.
    let mut depth = 0usize;
    let mut text = String::new();
    for c in lower.chars() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth = depth.saturating_sub(1),
            _ if depth > 0 => {}
            '_' | '/' | '|' | '#' | '"' | '“' | '”' => text.push(' '),
            '’' | '‘' => text.push('\''),
            _ => text.push(c),
        }
    }
    if let Some(at) = text.find(" by ") {
        text.truncate(at);
    }
    let words: Vec<String> = text
        .split_whitespace()
        .map(|w| {
            let w = w.trim_matches(|c: char| !c.is_alphanumeric() && c != '\'');
            // horse1, cake01: a number that only tells files apart
            let stem = w.trim_end_matches(|c: char| c.is_ascii_digit());
            if stem.len() >= 3 { stem.trim_end_matches('-').to_owned() } else { w.to_owned() }
        })
        .filter(|w| !w.is_empty() && !w.chars().all(|c| c.is_ascii_digit()))
        .filter(|w| {
            !["bw", "icon", "symbol", "clip", "svg", "ii", "iii", "i"].contains(&w.as_str())
        })
        .collect();
    let phrase = words.join(" ");
    let letters = phrase.chars().filter(|c| c.is_alphabetic()).count();
    let english = phrase.chars().all(|c| c.is_ascii_lowercase() || " -',".contains(c));
    (english && words.len() <= 7 && letters >= 3 && phrase.len() <= 60).then_some(phrase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pre_caption_as_in_the_reference() {
        let cases = [
            ("A \"Fuji\" apple!", "a fuji apple"),
            ("Tick.Tock: (two)  times;\n", "tick tock two times"),
            ("commas, hyphens-and 'quotes'? stay/so", "commas, hyphens-and 'quotes'? stay/so"),
        ];
        for (from, to) in cases {
            assert_eq!(pre_caption(from, 50), to);
        }
        assert_eq!(pre_caption(&"word ".repeat(80), 50).split(' ').count(), 50);
    }

    #[test]
    fn articles() {
        let cases = [
            ("red apple", "a red apple"),
            ("apple", "an apple"),
            ("unicorn", "a unicorn"),
            ("grapes", "grapes"),
            ("bus", "a bus"),
            ("pair of glasses", "a pair of glasses"),
            ("two cats", "two cats"),
            ("cooked rice", "cooked rice"),
            ("man with long legs", "a man with long legs"),
            ("x-ray", "an x-ray"),
            ("an owl", "an owl"),
        ];
        for (from, to) in cases {
            assert_eq!(with_article(from), to);
        }
    }

    #[test]
    fn nouns() {
        let cases = [
            ("a sumatran tiger", "tiger"),
            ("a bunch of grapes", "grapes"),
            ("a cup of tea", "cup"),
            ("a man running", "man"),
            ("a running shoe", "shoe"),
            ("a person doing yoga", "person"),
            ("a slice of pizza on a plate", "pizza"),
            ("hair", "hair"),
            ("a red and white anemone flower", "flower"),
            ("a penguin and a spider", "penguin"),
        ];
        for (from, to) in cases {
            assert_eq!(head_noun(from), to, "{from}");
        }
    }

    #[test]
    fn plurals() {
        let cases = [
            ("red apple", "red apples"),
            ("cherry", "cherries"),
            ("monkey", "monkeys"),
            ("box", "boxes"),
            ("firewoman", "firewomen"),
            ("starfish", "starfish"),
            ("leaf", "leaves"),
        ];
        for (from, to) in cases {
            assert_eq!(plural(from), to);
        }
    }

    #[test]
    fn titles_that_are_no_captions() {
        for bad in [
            "Clipart by Nicu Buculei - beer",
            "someone@example.org",
            "R16 sibmission",
            "books-aj.svg",
            "Aragón",
            "12",
            "L&Atilde;zard",
        ] {
            assert_eq!(clean_title(bad), None, "{bad}");
        }
        assert_eq!(clean_title("Apple (B and W)").as_deref(), Some("apple"));
        assert_eq!(clean_title("horse#1").as_deref(), Some("horse"));
        assert_eq!(clean_title("sleeping_cat").as_deref(), Some("sleeping cat"));
    }

    #[test]
    fn what_scenes_can_count() {
        for good in ["a cat", "a red apple", "an electric guitar", "a fire truck"] {
            assert!(is_plain_thing(good), "{good}");
        }
        for bad in
            ["hair", "grapes", "a cup of tea", "a man running", "two cats", "a cat, sleeping"]
        {
            assert!(!is_plain_thing(bad), "{bad}");
        }
    }
}
