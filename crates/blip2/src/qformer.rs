//! The Q-Former.
