"""LlamaGen's class-conditional transformer (arXiv 2406.06525): the family with every cache
policy."""

from fewlines.models.llamagen.model import Transformer

__all__ = ["Transformer"]
