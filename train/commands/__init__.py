"""The `train-sae` command."""
