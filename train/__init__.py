"""Activations to dictionaries."""
