//! Differentiable tensor ops and weight formats.
