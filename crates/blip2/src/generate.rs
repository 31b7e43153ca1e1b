//! Greedy, beam search and sampling over token ids.
