"""Networks: a folder for each family that draws images, the tokenizer, the classifier."""
