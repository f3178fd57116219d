"""ONNX, the format of ONNX Runtime and of what is built on it: Transformers.js, Optimum and others."""
