//! Weight names of other programs mapped to ours.
