"""Firings to statistics of every latent."""
