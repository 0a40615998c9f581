"""Small tools that every room may use: errors, tables, globs, and the names of the files that a run leaves."""

from .errors import InputError


__all__ = ["InputError"]
