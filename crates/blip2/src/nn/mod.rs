//! Leaves shared by all models.
