from .sparse import Selection, sparse_decode, sparse_encode


__all__ = ["Selection", "sparse_decode", "sparse_encode"]
