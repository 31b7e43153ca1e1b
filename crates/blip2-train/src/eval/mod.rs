//! Metrics, baselines and the report.
