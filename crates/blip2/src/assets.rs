//! Fetches and caches the parts of the mini model.
