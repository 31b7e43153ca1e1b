//! The Hugging Face hub as the environment describes it, with the variables of its Python library.

use std::path::PathBuf;

use anyhow::Context as _;
use blip2::hub::Hub;

const ENDPOINT: &str = "https://huggingface.co";

/// `HF_ENDPOINT`; `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else in `huggingface` in the user's cache; `HF_TOKEN`, else the file
/// `HF_TOKEN_PATH`, else the one that `huggingface-cli login` left; `HF_HUB_OFFLINE`.
pub(crate) fn from_env() -> anyhow::Result<Hub> {
    let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let home = var("HF_HOME").map(PathBuf::from).or_else(|| {
        let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(std::env::home_dir()?.join(".cache")));
        Some(cache?.join("huggingface"))
    });
    let cache = var("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("hub")));
    let cache = cache.context("no place for models of the hub: set HF_HOME to a folder")?;
    let token = match (var("HF_TOKEN"), var("HF_TOKEN_PATH")) {
        (Some(token), _) => Some(token),
        (None, Some(path)) => {
            Some(std::fs::read_to_string(&path).with_context(|| format!("HF_TOKEN_PATH {path}"))?)
        }
        (None, None) => home.and_then(|home| std::fs::read_to_string(home.join("token")).ok()),
    };
    let yes = |value: String| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str());
    let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
    let offline = var("HF_HUB_OFFLINE").is_some_and(yes);
    Ok(Hub::new(&endpoint, cache, token.map(|t| t.trim().to_owned()), offline))
}
