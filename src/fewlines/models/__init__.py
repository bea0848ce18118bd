"""One file per network: the tokenizer, the classifier, the transformer."""
