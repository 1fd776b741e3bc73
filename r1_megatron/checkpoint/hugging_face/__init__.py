"""The Hugging Face side of a model: configuration, tokenizer, and its weights into a built model."""
