//! Goes on from texts with a language model alone, and says how fast.
//!
//! Run with: `cargo run --release -p blip2 --example complete -- MODEL.gguf BEAMS "The capital of France is" …`

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use blip2::generate::{Beam, Options, Strategy, generate};
use blip2::llm::{Llm, LlmDecoder};
use blip2::tokenizer::{Padding, Side, Width};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, beams, prompts @ ..] = &args[..] else {
        return Err("arguments: MODEL.gguf BEAMS PROMPT…".into());
    };
    let clock = Instant::now();
    let (llm, tokenizer) = Llm::open(Path::new(model), None)?;
    println!("opened in {:.2?}", clock.elapsed());

    let padding = Padding { max_len: 512, side: Side::Left, width: Width::Longest };
    let batch = tokenizer.encode_batch(prompts, true, padding)?;
    let mut decoder = LlmDecoder::new(&llm, llm.embed(&batch.ids)?, batch.mask)?;
    let options = Options {
        strategy: Strategy::Beam(Beam { num_beams: beams.parse()?, ..Beam::default() }),
        max_new_tokens: 24,
        eos: vec![llm.eos()],
        ..Options::default()
    };
    let clock = Instant::now();
    let found = generate(&mut decoder, prompts.len(), &options)?;
    let seconds = clock.elapsed().as_secs_f64();
    for (prompt, best) in prompts.iter().zip(&found) {
        println!("{prompt}|{}  ({:.3})", tokenizer.decode(&best[0].tokens, true)?, best[0].score);
    }
    let tokens: usize = found.iter().map(|best| best[0].tokens.len()).sum();
    println!("{tokens} tokens in {seconds:.2} s: {:.1} tokens/s", tokens as f64 / seconds);
    Ok(())
}
