//! Named tensors of one checkpoint, read strictly.
