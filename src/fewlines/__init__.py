"""fewlines: autoregressive image generation with a key-value cache of a few lines of tokens."""
