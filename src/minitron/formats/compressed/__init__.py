"""The layout of compressed-tensors, which vLLM and transformers read: weights of eight or four bits with scales."""
