"""
Tensor functions without any model: the sparse products of heads, work on their rows, and measures of a reconstruction.
"""

from .sparse import Selection, sparse_decode, sparse_encode


__all__ = ["Selection", "sparse_decode", "sparse_encode"]
