"""Dictionaries to knowledge."""
