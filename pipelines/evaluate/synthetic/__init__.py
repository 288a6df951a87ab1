"""Dictionaries judged by the true features of a synthetic store."""
