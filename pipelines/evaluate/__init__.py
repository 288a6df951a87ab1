"""Metrics of an SAE that need the model it was trained on."""
