"""The sparse products of heads, passes over their rows, and measures of a reconstruction: tensors in, tensors out."""

from .sparse import Selection, sparse_decode, sparse_encode


__all__ = ["Selection", "sparse_decode", "sparse_encode"]
