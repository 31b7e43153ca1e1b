//! metrics.jsonl and the live line.
