"""Models in and out of Hugging Face folders and llama2.c files."""
