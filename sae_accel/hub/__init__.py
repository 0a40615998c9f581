"""Releases of heads. A run's folder comes in; one commit on the Hub goes out."""

from .release import Pushed, Release, open_repo


__all__ = ["Pushed", "Release", "open_repo"]
