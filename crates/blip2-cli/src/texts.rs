//! Texts as the bridge was trained on them, with a word of warning where one is cut.

use blip2::model::{Files, Model};
use blip2::tokenizer::Tokenizer;
use blip2_train::data::text::pre_caption;
use blip2_train::tasks::MAX_WORDS;

use crate::progress::say;

/// What `model` reads of each text: lower case, without most punctuation, as captions were in training. transformers
/// hands texts to its checkpoints as they are.
pub(crate) fn prepare(model: &Model, typed: &[String]) -> anyhow::Result<Vec<String>> {
    if matches!(model.files(), Files::HuggingFace(_)) {
        return Ok(typed.to_vec());
    }
    if let (Some(part), false) = (&model.manifest.stage1, typed.is_empty()) {
        let tokenizer = Tokenizer::from_wordpiece_vocab(&model.files().read(&part.vocab)?)?;
        for text in typed {
            if let Some(warning) = cut(text, &tokenizer, part.max_text_len)? {
                say(&format!("blip2: --text {text:?}: {warning}"));
            }
        }
    }
    Ok(typed.iter().map(|text| pre_caption(text, MAX_WORDS)).collect())
}

/// What is lost of `text` by a model that reads `max_text_len` tokens.
fn cut(text: &str, tokenizer: &Tokenizer, max_text_len: usize) -> blip2::Result<Option<String>> {
    let whole = pre_caption(text, usize::MAX);
    let words = whole.split_whitespace().count();
    let tokens = tokenizer.encode(&whole, true)?.len();
    Ok(if tokens > max_text_len {
        Some(format!("cut, for it has {tokens} tokens and the model reads {max_text_len}"))
    } else if words > MAX_WORDS {
        Some(format!("cut, for it has {words} words and the model reads {MAX_WORDS}"))
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_fits_is_not_cut() {
        let vocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n";
        let tokenizer = Tokenizer::from_wordpiece_vocab(vocab.as_bytes()).unwrap();
        let cut = |words: usize, max| cut(&"A! ".repeat(words), &tokenizer, max).unwrap();
        assert_eq!(cut(6, 8), None);
        assert_eq!(cut(7, 8).unwrap(), "cut, for it has 9 tokens and the model reads 8");
        assert_eq!(cut(50, 99), None);
        assert_eq!(cut(51, 99).unwrap(), "cut, for it has 51 words and the model reads 50");
    }
}
