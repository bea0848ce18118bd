"""The decode loop and its sampler."""
