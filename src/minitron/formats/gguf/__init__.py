"""GGUF, the format of llama.cpp and of what is built on it: Ollama, LM Studio and others."""
