//! Train-time changes of pictures.
