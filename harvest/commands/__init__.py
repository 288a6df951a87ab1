"""The `harvest` command."""
