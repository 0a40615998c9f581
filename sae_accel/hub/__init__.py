"""Releases. A run's folder comes in; one commit on the Hub goes out."""
