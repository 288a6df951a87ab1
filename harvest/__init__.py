"""Text to activations."""
