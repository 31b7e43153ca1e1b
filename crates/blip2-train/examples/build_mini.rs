//! Builds the mini set (or, with a number in place of the packages, the tiny one) and prints its report.
//!
//! `cargo run --release -p blip2-train --example build_mini -- OUT PACKAGES_FOLDER|N`

use std::path::Path;

use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::data::package::Origin;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, out, what] = arguments.as_slice() else {
        return Err("usage: build_mini OUT PACKAGES_FOLDER|N".into());
    };
    let config = match what.parse() {
        Ok(n) => MiniConfig::tiny(Path::new(out), n),
        Err(_) => MiniConfig::full(Path::new(out), Origin::Folder(what.into())),
    };
    let report = build(&config, &|step| eprintln!("{step}"))?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
