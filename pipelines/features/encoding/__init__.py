"""Rows to firings: sources, dictionaries, blocks on disk."""
