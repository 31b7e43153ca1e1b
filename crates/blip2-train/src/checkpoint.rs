//! Training checkpoints: atomic, hashed, resumable.
