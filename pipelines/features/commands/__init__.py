"""The `sae-features` command."""
