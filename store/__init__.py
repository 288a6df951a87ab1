"""Activations at rest: layout, protocol, reader and loader. Imports only `common`."""
