//! A recipe is one complete TOML file.
