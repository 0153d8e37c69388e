"""Data of language models: files of tokens, Hugging Face `datasets`, packing, and an order that no layout changes."""
