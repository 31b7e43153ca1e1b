//! The image encoder.
