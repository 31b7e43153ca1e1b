//! Reads weights out of an ONNX file.
