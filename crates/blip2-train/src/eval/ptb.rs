//! The tokens that caption metrics count.
//!
//! Published CIDEr, BLEU and ROUGE numbers are computed on the tokens of Stanford's `PTBTokenizer` (CoreNLP
//! 3.4.1, `-preserveLines -lowerCase`) with a list of punctuation taken out: `pycocoevalcap` starts a Java
//! program for it. This is the same job without Java, written from that program's observed answers (it is
//! GPL; none of its source was read) and compared with them token by token in `tests/metrics.rs`.
//!
//! It is a longest-match scanner: at every position each rule proposes a length, the longest wins, the
//! earlier one on a tie. It is **not** the whole of the Penn Treebank tokenizer. Known to differ:
//! - web addresses with unusual endings or characters, e-mail addresses with display names, file names with
//!   several endings, emoticons with noses other than `-`, markup with quotes inside attributes;
//! - letters that Unicode added after version 6 and scripts outside the basic plane (Java 7's tables drop
//!   some of them; they are letters here), and digits of other scripts than the common ones;
//! - a caption that *ends* in a single letter and a full stop (`plan B.`): the Java program reads into the
//!   next caption of its file and drops the stop from the token if that begins with `The`, `A`, `He`…;
//!   here a caption's tokens never depend on its neighbours;
//! - carriage returns and other line breaks within a caption, which shift `pycocoevalcap`'s lines against
//!   its ids; here they are spaces.

/// Tokens that are not counted: what `pycocoevalcap` removes after tokenising. Brackets come out of the
/// tokenizer as `-lrb-`, in lower case, so they are *not* removed by the upper-case entries; a well-known
/// oddity which published numbers include.
const DROPPED: [&str; 17] = [
    "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--",
    "...", ";",
];

/// The words of a caption as the metrics count them: lower case, punctuation removed.
///
/// A token can contain a no-break space (`1 1/2`, telephone numbers); BLEU and CIDEr then count
/// its parts, ROUGE the whole, as the Python does.
pub fn words(caption: &str) -> Vec<String> {
    let mut tokens = tokenize(caption);
    tokens.retain(|t| !DROPPED.contains(&t.as_str()));
    tokens
}

/// All tokens of a text, lower case, punctuation included; of full stops only their place in a token is kept
/// (the Java program repeats the stop of `etc.` at the end of a sentence).
pub fn tokenize(text: &str) -> Vec<String> {
    let chars: Vec<char> = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .filter(|&c| c != '\u{ad}')
        .collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let rest = &chars[at..];
        let mut best = Best::default();
        entities(rest, &mut best);
        markup(rest, &mut best);
        addresses(rest, &mut best);
        numbers(rest, &mut best);
        abbreviations(rest, &mut best);
        apostrophes(rest, &mut best);
        compounds(rest, &mut best);
        plain_words(rest, &mut best);
        faces(rest, &mut best);
        symbols(rest, &mut best);
        match best.text {
            // Nothing knows this character (an emoji, an unassigned one): it is dropped and separates.
            None => at += best.take.max(1),
            Some(text) => {
                tokens.push(text.to_lowercase());
                at += best.take;
            }
        }
    }
    tokens
}

/// The best proposal so far at one position.
#[derive(Default)]
struct Best {
    /// What the rule looked at, in characters: proposals compete by this.
    seen: usize,
    /// What becomes the token, in characters.
    take: usize,
    /// The token, before lower-casing; `None`: nothing comes out.
    text: Option<String>,
}

impl Best {
    fn offer(&mut self, seen: usize, take: usize, text: impl FnOnce() -> Option<String>) {
        if seen > self.seen {
            *self = Self { seen, take, text: text() };
        }
    }

    /// `length` characters as they stand; 0 is no proposal.
    fn offer_span(&mut self, rest: &[char], length: usize) {
        self.offer(length, length, || Some(rest[..length].iter().collect()));
    }

    /// As [`Self::offer_span`], with blanks and brackets written so that the token has neither.
    fn offer_escaped(&mut self, rest: &[char], length: usize) {
        self.offer(length, length, || Some(rest[..length].iter().map(|&c| escape(c)).collect()));
    }
}

fn escape(c: char) -> String {
    match c {
        '(' => "-LRB-".into(),
        ')' => "-RRB-".into(),
        ' ' => '\u{a0}'.into(),
        c => c.into(),
    }
}

// ---- characters ------------------------------------------------------------------------------

fn is_digit(c: char) -> bool {
    matches!(c, '0'..='9' | '\u{660}'..='\u{669}' | '\u{6f0}'..='\u{6f9}' | '\u{966}'..='\u{96f}' | '\u{ff10}'..='\u{ff19}')
}

fn is_letter(c: char) -> bool {
    let mark = matches!(c as u32,
        0x2C2..=0x2C5 | 0x2D2..=0x2DF | 0x2E5..=0x36F | 0x375 | 0x483..=0x487 | 0x55A..=0x55F | 0x591..=0x5BD | 0x5BF | 0x5C1
        | 0x5C2 | 0x5C4 | 0x5C5 | 0x5C7 | 0x615..=0x61A | 0x64B..=0x65E | 0x670 | 0x6D6..=0x6ED | 0x900..=0x903
        | 0x93C..=0x955 | 0x962 | 0x963 | 0x981..=0x983 | 0x9BC..=0x9CD | 0x9E2 | 0x9E3 | 0xA01..=0xA03 | 0xA3C..=0xA4F
        | 0xA81..=0xA83 | 0xABC..=0xACF | 0xB82 | 0xBBE..=0xBCD | 0xC01..=0xC03 | 0xC3E..=0xC56 | 0xD3E..=0xD48 | 0xE31
        | 0xE34..=0xE3A | 0xE47..=0xE4E | 0xEB1 | 0xEB4..=0xEBC | 0xEC8..=0xECD);
    c <= '\u{ffff}'
        && !is_digit(c)
        && (c.is_alphabetic() || mark)
        && !matches!(c, '\u{2160}'..='\u{2188}' | '\u{24b6}'..='\u{24e9}')
}

fn is_alnum(c: char) -> bool {
    is_letter(c) || is_digit(c)
}

fn is_apostrophe(c: char) -> bool {
    matches!(c, '\'' | '\u{2019}')
}

/// How many characters from `from` on satisfy `test`.
fn run(rest: &[char], from: usize, test: impl Fn(char) -> bool) -> usize {
    rest.get(from..).unwrap_or(&[]).iter().take_while(|&&c| test(c)).count()
}

fn at(rest: &[char], index: usize) -> Option<char> {
    rest.get(index).copied()
}

fn is_at(rest: &[char], index: usize, test: impl Fn(char) -> bool) -> bool {
    at(rest, index).is_some_and(test)
}

/// Does `rest` start with `word`, whatever the case? (`word` in lower-case ASCII.)
fn starts(rest: &[char], word: &str) -> bool {
    word.len() <= rest.len() && word.chars().zip(rest).all(|(w, c)| w == c.to_ascii_lowercase())
}

// ---- rules -----------------------------------------------------------------------------------

/// `&amp;` and the few other entities that are read; others stay a token of their own.
fn entities(rest: &[char], best: &mut Best) {
    if at(rest, 0) != Some('&') {
        return;
    }
    for (name, text) in [
        ("&amp;", Some("&")),
        ("&lt;", Some("<")),
        ("&gt;", Some(">")),
        ("&quot;", Some("''")),
        ("&apos;", Some("'")),
        ("&nbsp;", None),
    ] {
        if starts(rest, name) {
            best.offer(name.len(), name.len(), || text.map(Into::into));
        }
    }
    let hash = usize::from(at(rest, 1) == Some('#'));
    let body =
        run(
            rest,
            1 + hash,
            |c| if hash == 1 { c.is_ascii_digit() } else { c.is_ascii_alphabetic() },
        );
    let accent = ["acute;", "grave;", "uml;", "circ;", "tilde;", "cedil;"]
        .iter()
        .any(|end| starts(rest.get(2..).unwrap_or(&[]), end));
    if body > 0 && at(rest, 1 + hash + body) == Some(';') && (hash == 1 || accent) {
        best.offer_span(rest, 2 + hash + body);
    }
}

/// `<b>`, `</b>`, `<a href=x>`.
fn markup(rest: &[char], best: &mut Best) {
    if at(rest, 0) != Some('<') {
        return;
    }
    let slash = usize::from(is_at(rest, 1, |c| matches!(c, '/' | '!' | '?')));
    if is_at(rest, 1 + slash, |c| c.is_ascii_alphabetic()) {
        let body = run(rest, 1 + slash, |c| !matches!(c, '<' | '>'));
        let plain =
            rest[1 + slash..][..body].iter().filter(|c| matches!(c, '"' | '\'')).count() % 2 == 0;
        if plain && at(rest, 1 + slash + body) == Some('>') {
            best.offer_escaped(rest, 2 + slash + body);
        }
    }
}

/// Web and e-mail addresses, `@names`, `#tags`, file names.
fn addresses(rest: &[char], best: &mut Best) {
    let web = |from: usize| {
        let length = run(rest, from, |c| {
            c.is_ascii_graphic() && !matches!(c, '<' | '>' | '|' | '(' | ')' | '"' | '`')
        });
        // Punctuation at the end belongs to the sentence.
        (0..=length)
            .rev()
            .find(|&n| n == 0 || !matches!(rest[from + n - 1], '.' | ',' | '!' | '?' | ';' | ':'))
            .unwrap_or(0)
    };
    for start in ["http://", "https://"] {
        let length = if starts(rest, start) { web(start.len()) } else { 0 };
        if rest.get(start.len()..).unwrap_or(&[]).iter().take(length).skip(1).any(|&c| c == '.') {
            best.offer_span(rest, start.len() + length);
        }
    }
    if starts(rest, "www.") {
        let host = run(rest, 0, |c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'));
        let dots = rest[..host].iter().filter(|&&c| c == '.').count();
        if dots >= 2 && at(rest, host) == Some('/') {
            best.offer_span(rest, web(0));
        }
    }
    if at(rest, 0) == Some('@') && is_at(rest, 1, |c| c.is_ascii_alphabetic() || c == '_') {
        best.offer_span(rest, 1 + run(rest, 1, |c| c.is_ascii_alphanumeric() || c == '_'));
    }
    if at(rest, 0) == Some('#') {
        let letters = run(rest, 1, is_letter);
        if letters > 0 {
            best.offer_span(rest, 1 + letters);
        }
    }
    let user = run(rest, 0, |c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if user > 0 && rest[0].is_ascii_alphanumeric() && at(rest, user) == Some('@') {
        let host =
            run(rest, user + 1, |c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        let ends = |n: usize| n > 0 && rest[user + n].is_ascii_alphanumeric();
        if let Some(host) = (1..=host).rev().find(|&n| ends(n)) {
            best.offer_span(rest, user + 1 + host);
        }
    }
    file_name(rest, best);
}

const FILE_ENDINGS: [&str; 35] = [
    "bat", "bmp", "c", "cgi", "class", "cpp", "dll", "doc", "docx", "exe", "gif", "gz", "h", "htm",
    "html", "jar", "java", "jpeg", "jpg", "mov", "mp3", "pdf", "php", "pl", "png", "ppt", "ps",
    "py", "sql", "tar", "txt", "wav", "x", "xml", "zip",
];

/// `0001.jpg`; names that begin with a letter are dotted words anyway.
fn file_name(rest: &[char], best: &mut Best) {
    let mut end = run(rest, 0, is_alnum);
    while end > 0 && at(rest, end) == Some('.') {
        let part = run(rest, end + 1, is_alnum);
        let ending: String =
            rest[end + 1..][..part].iter().collect::<String>().to_ascii_lowercase();
        if part == 0 {
            return;
        }
        end += 1 + part;
        if FILE_ENDINGS.contains(&ending.as_str()) {
            best.offer_span(rest, end);
        }
    }
}

/// Length of `12`, `1,000`, `5:30`, `.5`, `1.2.3` at `from`.
fn number_length(rest: &[char], from: usize, separators: &[char]) -> usize {
    let mut end = from + run(rest, from, is_digit);
    while is_at(rest, end, |c| separators.contains(&c)) && is_at(rest, end + 1, is_digit) {
        end += 1 + run(rest, end + 1, is_digit);
    }
    end - from
}

/// Numbers with sign, fractions, telephone numbers, decades, money signs.
fn numbers(rest: &[char], best: &mut Best) {
    let sign = usize::from(is_at(rest, 0, |c| matches!(c, '+' | '-')));
    let number = number_length(rest, sign, &['.', ',', ':', '\u{66b}', '\u{66c}']);
    if number > 0 {
        best.offer_span(rest, sign + number);
    }
    fraction(rest, best);
    telephone(rest, best);
    // '90s, '99: a decade anywhere, other years only before a blank.
    if is_at(rest, 0, is_apostrophe) && run(rest, 1, |c| c.is_ascii_digit()) == 2 {
        let s = usize::from(is_at(rest, 3, |c| c.eq_ignore_ascii_case(&'s')));
        let decade =
            s == 1 && matches!(rest[1], '2'..='9') && rest[2] == '0' && !is_at(rest, 4, is_alnum);
        if decade || rest.len() == 3 || rest[3].is_whitespace() {
            best.offer_span(rest, if decade { 4 } else { 3 });
        }
    }
    for (sign, text) in [
        ('£', "#"),
        ('€', "$"),
        ('¤', "$"),
        ('₠', "$"),
        ('¢', "cents"),
        ('½', "1/2"),
        ('¼', "1/4"),
        ('¾', "3/4"),
        ('⅓', "1/3"),
        ('⅔', "2/3"),
    ] {
        if at(rest, 0) == Some(sign) {
            best.offer(1, 1, || Some(text.into()));
        }
    }
    // US$, A$, C$…
    let letters = run(rest, 0, |c| c.is_ascii_uppercase());
    if at(rest, letters) == Some('$') {
        let country: String = rest[..letters].iter().collect();
        if ["A", "C", "HK", "NZ", "S", "US"].contains(&country.as_str()) {
            best.offer_span(rest, letters + 1);
        }
    }
}

/// `1/2`, `3 1/2` (one token with a no-break space).
fn fraction(rest: &[char], best: &mut Best) {
    let digits = |from: usize| Some(run(rest, from, is_digit)).filter(|n| (1..=4).contains(n));
    let simple = |from: usize| {
        let top = digits(from)?;
        let back = usize::from(at(rest, from + top) == Some('\\'));
        is_at(rest, from + top + back, |c| matches!(c, '/' | '\u{2044}')).then_some(())?;
        let bottom = run(rest, from + top + back + 1, is_digit).min(4);
        (bottom > 0).then_some(top + back + 1 + bottom)
    };
    if let Some(length) = simple(0) {
        best.offer_span(rest, length);
    }
    if let Some(whole) = digits(0)
        && is_at(rest, whole, |c| matches!(c, ' ' | '-' | '\u{a0}'))
        && let Some(length) = simple(whole + 1)
    {
        best.offer_escaped(rest, whole + 1 + length);
    }
}

/// `(555) 123-4567`, `555 123 4567` and, as the model does, any such row of numbers.
fn telephone(rest: &[char], best: &mut Best) {
    let gap = |c: char| matches!(c, '-' | ' ' | '\u{a0}');
    // The longest way to read the remaining groups: every group may be 3 digits or as many as given.
    let tail = |from: usize| {
        let mut longest = None;
        for first in 3..=4 {
            if run(rest, from, is_digit) < first {
                continue;
            }
            let blank = usize::from(is_at(rest, from + first, gap));
            for blank in 0..=blank {
                let last = run(rest, from + first + blank, is_digit).min(5);
                if last >= 3 {
                    longest = longest.max(Some(from + first + blank + last));
                }
            }
        }
        longest
    };
    let mut longest = None;
    if at(rest, 0) == Some('(') {
        let area = run(rest, 1, is_digit);
        if (2..=3).contains(&area) && at(rest, 1 + area) == Some(')') {
            let blank = usize::from(is_at(rest, 2 + area, |c| matches!(c, ' ' | '\u{a0}')));
            longest = longest.max(tail(2 + area + blank));
        }
    }
    let plus = run(rest, 0, |c| c == '+').min(2);
    let group = |from: usize| {
        let n = run(rest, from, is_digit);
        ((2..=4).contains(&n) && is_at(rest, from + n, gap)).then_some(from + n + 1)
    };
    if let Some(one) = group(plus) {
        longest = longest.max(tail(one));
        if let Some(two) = group(one) {
            longest = longest.max(tail(two));
        }
    }
    if let Some(length) = longest {
        best.offer_escaped(rest, length);
    }
}

/// Words after which a full stop is part of the token.
const ABBREVIATIONS: [&str; 138] = [
    "adj", "adm", "adv", "al", "ala", "alex", "apr", "ariz", "assn", "assoc", "asst", "atty",
    "aug", "ave", "bhd", "bldg", "blvd", "brig", "bros", "calif", "capt", "cf", "cie", "cmdr",
    "co", "col", "colo", "comdr", "conn", "corp", "cos", "cpl", "ct", "dak", "dec", "dept", "det",
    "dr", "drs", "elec", "ens", "esq", "est", "etc", "ext", "feb", "fla", "fri", "ft", "ga", "gen",
    "gov", "govs", "hon", "inc", "ind", "insp", "intl", "invt", "jan", "jos", "jr", "jul", "jun",
    "kan", "kans", "ky", "lieut", "lt", "ltd", "maj", "mar", "md", "messrs", "mfg", "mich", "minn",
    "mlle", "mme", "mo", "mon", "mont", "mr", "mrs", "ms", "msgr", "mt", "mtg", "natl", "neb",
    "nev", "nov", "oct", "okla", "penn", "pfc", "ph", "plc", "ppte", "ppty", "pres", "prof",
    "profs", "pte", "ptes", "pty", "ptys", "pvt", "rd", "rep", "reps", "rev", "rt", "sen", "sens",
    "sep", "sept", "seq", "sfc", "sgt", "spc", "sq", "sr", "st", "ste", "supt", "sys", "tel",
    "tenn", "thu", "thurs", "treas", "tue", "tues", "univ", "va", "vs", "vt",
];
/// The rest of the list.
const ABBREVIATIONS_W: [&str; 5] = ["wed", "wis", "wisc", "wm", "wyo"];
/// American states: only with a capital, for `mass.` and `ill.` are words.
const STATES: [&str; 11] =
    ["ark", "az", "del", "ill", "la", "mass", "miss", "ore", "pa", "tex", "wash"];
/// Only before a number: `no. 5`, `fig. 2`.
const NUMBERED: [&str; 9] = ["art", "ca", "fig", "figs", "no", "nos", "op", "pp", "prop"];
/// A capitalised word of these begins a new sentence, so that the stop before it is a stop.
const STARTERS: [&str; 44] = [
    "A",
    "About",
    "According",
    "Additionally",
    "After",
    "An",
    "As",
    "At",
    "But",
    "Earlier",
    "He",
    "Her",
    "Here",
    "However",
    "If",
    "In",
    "It",
    "Last",
    "Many",
    "More",
    "Now",
    "Once",
    "One",
    "Other",
    "Our",
    "She",
    "Since",
    "So",
    "Some",
    "Such",
    "That",
    "The",
    "Their",
    "Then",
    "There",
    "These",
    "They",
    "This",
    "We",
    "What",
    "When",
    "While",
    "Yet",
    "You",
];

/// `Mr.`, `e.g.`, `U.S.`, `no. 5`.
fn abbreviations(rest: &[char], best: &mut Best) {
    let word = run(rest, 0, is_letter);
    if word == 0 {
        return;
    }
    let pairs = initials(rest, 0);
    if pairs > 1 || pairs == 1 && !sentence_begins(&rest[2..]) {
        best.offer_span(rest, 2 * pairs);
        hyphenated_on(rest, 2 * pairs, best);
    }
    if starts(rest, "ph.d.") {
        best.offer_span(rest, 5);
    }
    if word == 1 || at(rest, word) != Some('.') {
        return;
    }
    let spelled: String = rest[..word].iter().collect();
    let lower = spelled.to_ascii_lowercase();
    let lower = lower.as_str();
    let state = STATES.contains(&lower) && rest[0].is_ascii_uppercase();
    if state || ABBREVIATIONS.contains(&lower) || ABBREVIATIONS_W.contains(&lower) {
        best.offer_span(rest, word + 1);
    }
    let blank = usize::from(is_at(rest, word + 1, |c| matches!(c, ' ' | '\u{a0}')));
    if NUMBERED.contains(&lower)
        && (is_at(rest, word + 1 + blank, is_digit)
            || is_at(rest, word + 1, |c| matches!(c, ',' | ';' | ':')))
    {
        best.offer(word + 2 + blank, word + 1, || Some(spelled + "."));
    }
}

/// How many times from `from` on one letter and a stop follow each other: `e.g.` has 2.
fn initials(rest: &[char], from: usize) -> usize {
    let mut pairs = 0;
    while is_at(rest, from + 2 * pairs, |c| c.is_ascii_alphabetic())
        && at(rest, from + 2 * pairs + 1) == Some('.')
    {
        pairs += 1;
    }
    pairs
}

/// `U.S.-made`, from the end of the abbreviation on.
fn hyphenated_on(rest: &[char], from: usize, best: &mut Best) {
    let mut end = from;
    while at(rest, end) == Some('-') && is_at(rest, end + 1, |c| c.is_ascii_alphanumeric()) {
        let pairs = initials(rest, end + 1);
        if pairs > 1 {
            best.offer_span(rest, end + 1 + 2 * pairs);
        }
        end += 1 + run(rest, end + 1, |c| c.is_ascii_alphanumeric());
    }
    if end > from {
        best.offer_span(rest, end);
    }
}

/// Blank, then one of [`STARTERS`].
fn sentence_begins(rest: &[char]) -> bool {
    let blanks = run(rest, 0, char::is_whitespace);
    let word: String = rest[blanks..].iter().take_while(|&&c| is_letter(c)).collect();
    blanks > 0 && !word.is_empty() && STARTERS.contains(&word.as_str())
}

/// What is split off behind an apostrophe.
const CLITICS: [&str; 6] = ["s", "d", "m", "ll", "re", "ve"];

/// `'s`, `n't`, `'em`, `'til`, `ol'`, `'tis`, and what quotation marks become.
fn apostrophes(rest: &[char], best: &mut Best) {
    let no_letter = |index: usize| !is_at(rest, index, |c| c.is_ascii_alphabetic());
    let plain = |n: usize| {
        rest[..n].iter().map(|&c| if is_apostrophe(c) { '\'' } else { c }).collect::<String>()
    };
    if is_at(rest, 0, is_apostrophe) {
        for end in CLITICS {
            let length = 1 + end.len();
            if starts(&rest[1..], end) && no_letter(length) {
                best.offer(length + 1, length, || Some(plain(length)));
            }
        }
        for word in ["em", "til", "till", "cause"] {
            if starts(&rest[1..], word) {
                best.offer(1 + word.len(), 1 + word.len(), || Some(plain(1 + word.len())));
            }
        }
        for word in ["tis", "twas"] {
            if starts(&rest[1..], word) && !is_at(rest, 1 + word.len(), is_alnum) {
                best.offer(2 + word.len(), 2, || Some(plain(2)));
            }
        }
        if starts(&rest[1..], "n") {
            let close = usize::from(is_at(rest, 2, is_apostrophe));
            // A curly one before n is always the n of "and".
            if close == 1
                || rest[0] == '\u{2019}'
                || is_at(rest, 2, char::is_whitespace)
                || rest.len() == 2
            {
                best.offer_span(rest, 2 + close);
            }
        }
    }
    if starts(rest, "n") && is_at(rest, 1, is_apostrophe) && starts(&rest[2..], "t") {
        best.offer(3, 3, || Some(plain(3)));
    }
    // French and Irish beginnings stand alone only where no word can follow them.
    if is_at(rest, 0, |c| "lLdDjJ".contains(c)) && is_at(rest, 1, is_apostrophe) {
        best.offer_span(rest, 2);
    }
    let spoken = |c: char| c.is_ascii_alphabetic() && !"dms".contains(c.to_ascii_lowercase());
    if is_at(rest, 0, |c| "yY".contains(c))
        && is_at(rest, 1, is_apostrophe)
        && is_at(rest, 2, spoken)
    {
        best.offer(3, 2, || Some(rest[..2].iter().collect()));
    }
    for word in ["dunkin'", "somethin'", "ol'", "c'mon", "e'er"] {
        if starts(&fold_apostrophes(rest, word.len()), word) {
            best.offer_span(rest, word.len());
        }
    }
    quotes(rest, best);
}

fn fold_apostrophes(rest: &[char], length: usize) -> Vec<char> {
    rest.iter().take(length).map(|&c| if is_apostrophe(c) { '\'' } else { c }).collect()
}

/// Quotation marks; all of them but the low ones are dropped from [`words`], only their extent matters.
fn quotes(rest: &[char], best: &mut Best) {
    // Two curly marks in a row are one token, which the list of dropped tokens does not know.
    let curly =
        |c| matches!(c, '\u{2018}'..='\u{201d}' | '\u{ab}' | '\u{bb}' | '\u{2039}' | '\u{203a}');
    let curly = run(rest, 0, curly).min(2);
    let plain = |c: &char| match c {
        '\u{201a}' => "\u{201a}",
        '\u{2018}' | '\u{201b}' | '\u{2039}' => "`",
        '\u{201c}' | '\u{ab}' => "``",
        '\u{201d}' | '\u{bb}' => "''",
        _ => "'",
    };
    if curly > 1 {
        return best.offer(curly, curly, || Some(rest[..curly].iter().map(plain).collect()));
    }
    let opens = |index: usize| is_at(rest, index, |c| is_alnum(c) || c == '$');
    let text = match at(rest, 0) {
        Some('"') if opens(1) => "``",
        Some('"' | '\u{201d}' | '\u{bb}') => "''",
        Some('\u{201c}' | '\u{ab}') => "``",
        Some('\u{2018}' | '\u{201b}' | '\u{2039}') => "`",
        Some('\u{203a}') => "'",
        Some('`') if at(rest, 1) == Some('`') => return best.offer_span(rest, 2),
        Some('\'') if at(rest, 1) == Some('\'') => return best.offer_span(rest, 2),
        Some('\'') if opens(1) && is_at(rest, 2, |c| !c.is_whitespace()) => "`",
        Some('\'' | '\u{2019}') => "'",
        _ => return,
    };
    best.offer(1, 1, || Some(text.into()));
}

/// Several words in one token: `t-shirt`, `and/or`, `foo_bar`, `example.com`, `AT&T`, `o'clock`.
fn compounds(rest: &[char], best: &mut Best) {
    let joint = |c: char| matches!(c, '-' | '_' | '\u{2010}' | '\u{2011}' | '\u{58a}');
    // One of d' l' n' o' before a letter, then the word.
    let segment = |from: usize| {
        let prefix = is_at(rest, from, |c| "dDlLnNoO".contains(c))
            && is_at(rest, from + 1, is_apostrophe)
            && run(rest, from + 2, is_letter) > 0;
        let start = if prefix { from + 2 } else { from };
        let body = run(rest, start, is_alnum);
        if body == 0 { 0 } else { start + body - from }
    };
    let mut end = segment(0);
    // o'a: a single letter behind the apostrophe is a word of its own, unless it is o'o or n't.
    if end == 3 && is_at(rest, 1, is_apostrophe) {
        end = if starts(rest, "o'o") || starts(rest, "n't") { 3 } else { 1 };
    }
    let negation = starts(rest, "n") && is_at(rest, 1, is_apostrophe);
    if negation {
        end = end.min(2 + run(rest, 2, is_letter));
    }
    while end > 0 && !negation && is_at(rest, end, joint) && segment(end + 1) > 0 {
        if at(rest, end) == Some('-') && initials(rest, end + 1) > 1 {
            // plate-T.V., non-U.S.-made
            let tail = end + 1 + 2 * initials(rest, end + 1);
            best.offer_span(rest, tail);
            hyphenated_on(rest, tail, best);
        }
        end += 1 + segment(end + 1);
    }
    best.offer_span(rest, end);
    let decimal = number_length(rest, 0, &['.', ',']);
    if decimal > 0 {
        hyphenated_on(rest, decimal, best);
    }
    underscores(rest, best);
    slashed(rest, best);
    dotted(rest, best);
    vowel_joined(rest, best);
    // AT&T: capitals on both sides.
    let capitals = |from: usize| run(rest, from, |c| c.is_ascii_uppercase());
    let amp = |from: usize| {
        if at(rest, from) != Some('&') {
            0
        } else if starts(&rest[from..], "&amp;") {
            5
        } else {
            1
        }
    };
    let mut end = capitals(0);
    let mut joined = false;
    while end > 0 && amp(end) > 0 && capitals(end + amp(end)) > 0 {
        end += amp(end);
        end += capitals(end);
        joined = true;
    }
    if joined {
        best.offer(end, end, || {
            Some(rest[..end].iter().collect::<String>().replace("&amp;", "&").replace("&AMP;", "&"))
        });
    }
    if starts(rest, "c++") {
        best.offer_span(rest, 3);
    }
    if starts(rest, "c#") || starts(rest, "f#") {
        best.offer_span(rest, 2);
    }
}

/// A row of underscores.
fn underscores(rest: &[char], best: &mut Best) {
    best.offer_span(rest, run(rest, 0, |c| c == '_'));
}

/// `and/or`, `black-and-white/red`: two or three parts of ASCII letters, digits and hyphens.
fn slashed(rest: &[char], best: &mut Best) {
    let part = |from: usize| {
        let mut end = from + run(rest, from, |c| c.is_ascii_alphanumeric());
        for _ in 0..2 {
            if end > from
                && at(rest, end) == Some('-')
                && is_at(rest, end + 1, |c| c.is_ascii_alphabetic())
            {
                end += 1 + run(rest, end + 1, |c| c.is_ascii_alphabetic());
            }
        }
        end - from
    };
    let mut end = part(0);
    for _ in 0..2 {
        let back = usize::from(at(rest, end) == Some('\\'));
        if end == 0 || at(rest, end + back) != Some('/') || part(end + back + 1) == 0 {
            return;
        }
        end += back + 1 + part(end + back + 1);
        best.offer_span(rest, end);
    }
}

/// `example.com`, `end.Another`, `yahoo!s`: words that begin with a letter, a mark between them.
fn dotted(rest: &[char], best: &mut Best) {
    let word =
        |from: usize| if is_at(rest, from, is_letter) { run(rest, from, is_alnum) } else { 0 };
    let letters_only = |from: usize| run(rest, from, is_letter);
    let mut end = word(0);
    while end > 0 && at(rest, end) == Some('.') && word(end + 1) > 0 {
        end += 1 + word(end + 1);
    }
    if end > word(0) {
        best.offer_span(rest, end);
        hyphenated_on(rest, end, best);
    }
    // a.-b, and a stop before the first hyphen.
    if end > 0 && at(rest, end) == Some('.') && at(rest, end + 1) == Some('-') {
        hyphenated_on(rest, end + 1, best);
    }
    let mut end = letters_only(0);
    let first = end;
    while end > 0 && is_at(rest, end, |c| matches!(c, '.' | '!' | '?')) && letters_only(end + 1) > 0
    {
        end += 1 + letters_only(end + 1);
    }
    if end > first && !is_at(rest, end, is_digit) {
        best.offer_span(rest, end);
    }
}

/// `ma'am`, `hawai'i`: a vowel on both sides of the apostrophe.
fn vowel_joined(rest: &[char], best: &mut Best) {
    let first = run(rest, 0, is_letter);
    let vowel = |c: char| "aeiou".contains(c.to_ascii_lowercase());
    // C'est: one capital, then at least two letters.
    let second = run(rest, 2, |c| c.is_ascii_alphabetic());
    if first == 1
        && matches!(rest[0], 'A'..='H' | 'J'..='X' | 'Z')
        && is_at(rest, 1, is_apostrophe)
        && second > 1
    {
        let clitic = CLITICS.iter().any(|c| second == c.len() && starts(&rest[2..], c));
        best.offer_span(rest, if clitic { 0 } else { 2 + second });
    }
    if first < 2 && !(first == 1 && rest[0].eq_ignore_ascii_case(&'o')) {
        return;
    }
    if (vowel(rest[first - 1]) || rest[first - 1].eq_ignore_ascii_case(&'y'))
        && is_at(rest, first, is_apostrophe)
        && is_at(rest, first + 1, |c| vowel(c) || c.is_ascii_uppercase())
    {
        let second = run(rest, first + 1, is_letter);
        let clitic = CLITICS.iter().any(|c| second == c.len() && starts(&rest[first + 1..], c));
        if !clitic && (second > 1 || is_at(rest, first + 1, vowel)) {
            best.offer_span(rest, first + 1 + second);
        }
    }
}

/// Words, with `n't` split off and the few that are two words run together.
fn plain_words(rest: &[char], best: &mut Best) {
    let length = run(rest, 0, is_alnum);
    if length == 0 || run(rest, 0, is_digit) == length {
        return;
    }
    best.offer_span(rest, length);
    let quote = |c: char| is_apostrophe(c) || matches!(c, '\u{2018}' | '`');
    if length > 1
        && rest[length - 1].eq_ignore_ascii_case(&'n')
        && is_at(rest, length, quote)
        && is_at(rest, length + 1, |c| c.eq_ignore_ascii_case(&'t'))
        && !rest[length - 2].eq_ignore_ascii_case(&'n')
        && rest[..length].iter().all(char::is_ascii_alphabetic)
    {
        best.offer(length + 2, length - 1, || Some(rest[..length - 1].iter().collect()));
    }
    for (word, cut) in
        [("cannot", 3), ("gonna", 3), ("gotta", 3), ("lemme", 3), ("gimme", 3), ("wanna", 3)]
    {
        let clitic = is_at(rest, length, is_apostrophe)
            && is_at(rest, length + 1, |c| c.is_ascii_alphabetic());
        if length == word.len() && starts(rest, word) && !clitic {
            best.offer(length + 1, cut, || Some(rest[..cut].iter().collect()));
        }
    }
}

/// `:)`, `;-)`, `^_^`, `:D`; brackets in them are written out.
fn faces(rest: &[char], best: &mut Best) {
    if is_at(rest, 0, |c| matches!(c, ':' | ';' | '=')) {
        let nose = usize::from(is_at(rest, 1, |c| matches!(c, '-' | '\'')));
        if is_at(rest, 1 + nose, |c| matches!(c, '(' | ')' | 'D' | 'P' | 'p' | ']' | '['))
            && !is_at(rest, 2 + nose, is_alnum)
        {
            best.offer_escaped(rest, 2 + nose);
        }
        if nose == 0
            && is_at(rest, 1, |c| matches!(c, '\\' | '|' | '{'))
            && !is_at(rest, 2, is_alnum)
        {
            best.offer_escaped(rest, 2);
        }
    }
    for face in ["^_^", ">_<", "o.o", "t_t"] {
        if starts(rest, face) {
            best.offer_span(rest, 3);
        }
    }
    let angry = at(rest, 0) == Some('>')
        && at(rest, 1) == Some(':')
        && is_at(rest, 2, |c| matches!(c, '(' | ')'));
    if angry {
        best.offer_escaped(rest, 3);
    }
}

/// Everything that is a token by itself.
fn symbols(rest: &[char], best: &mut Best) {
    let Some(&c) = rest.first() else { return };
    if c.is_whitespace() {
        return best.offer(1, 1, || None);
    }
    for bracket in ["-lrb-", "-rrb-", "-lcb-", "-rcb-", "-lsb-", "-rsb-", "\\*"] {
        if starts(rest, bracket) {
            best.offer_span(rest, bracket.len());
        }
    }
    let dashes = run(rest, 0, |c| c == '-');
    let text = match c {
        '-' if dashes > 4 => return best.offer_span(rest, dashes),
        '-' if dashes > 1 => return best.offer(dashes, dashes, || Some("--".into())),
        '\u{2013}' | '\u{2014}' | '\u{2015}' => "--",
        '\u{2026}' => "...",
        '.' if run(rest, 0, |c| c == '.') >= 3 => {
            return best.offer(run(rest, 0, |c| c == '.'), run(rest, 0, |c| c == '.'), || {
                Some("...".into())
            });
        }
        '.' if starts(rest, ". . .") => return best.offer(5, 5, || Some("...".into())),
        '!' | '?' => return best.offer_span(rest, run(rest, 0, |c| matches!(c, '!' | '?'))),
        '*' => return best.offer_span(rest, run(rest, 0, |c| c == '*').min(3)),
        '#' if at(rest, 1) == Some('#') => {
            return best.offer_span(rest, run(rest, 0, |c| c == '#'));
        }
        '<' | '>' if at(rest, 1) == Some(c) => return best.offer_span(rest, 2),
        '(' => "-LRB-",
        ')' => "-RRB-",
        '[' => "-LSB-",
        ']' => "-RSB-",
        '{' => "-LCB-",
        '}' => "-RCB-",
        c if is_symbol(c) => return best.offer_span(rest, 1),
        _ => return,
    };
    best.offer(1, 1, || Some(text.into()));
}

/// Characters that make a token by themselves; all others that are no letter, digit or blank are dropped.
fn is_symbol(c: char) -> bool {
    c.is_ascii_punctuation()
        || matches!(c as u32,
            0xA1 | 0xA5..=0xA9 | 0xAC | 0xAE..=0xB4 | 0xB6..=0xB9 | 0xBF | 0xD7 | 0xF7 | 0x37E | 0x387 | 0x589 | 0x5BE
            | 0x60C | 0x61B | 0x61F | 0x66A | 0x66D | 0x6D4 | 0x964 | 0x965 | 0xE3F | 0xE4F | 0x2016 | 0x2017 | 0x201A
            | 0x201E..=0x2023 | 0x2030..=0x2038 | 0x203B | 0x203E..=0x2042 | 0x2044 | 0x2070 | 0x2074..=0x207E
            | 0x2080..=0x208E | 0x20A4 | 0x2100 | 0x2101 | 0x2103..=0x2106 | 0x2108 | 0x2109 | 0x2114 | 0x2116..=0x2118
            | 0x211E..=0x2123 | 0x2125 | 0x2127 | 0x2129 | 0x212E | 0x213A | 0x213B | 0x2140..=0x2144 | 0x214A..=0x214D
            | 0x214F | 0x2155..=0x215E | 0x2190..=0x2BFF | 0x3001 | 0x3002 | 0x3012 | 0x30FB | 0xFF01..=0xFF0F
            | 0xFF1A..=0xFF20 | 0xFF3B..=0xFF40 | 0xFF5B..=0xFF65 | 0xFFE0 | 0xFFE1 | 0xFFE5 | 0xFFE6)
}
