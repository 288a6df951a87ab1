"""Activations at rest: layout, protocol, reader and loader. Stands on nothing of ours."""
