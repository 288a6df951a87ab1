"""Explanations of latents: written by a language model, simulated, scored, revised."""
