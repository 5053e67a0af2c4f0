"""GGUF files of llama.cpp: their header and tensors, and their tokenizer."""
