"""Models in and out of Hugging Face folders, and in from GGUF and llama2.c files."""
