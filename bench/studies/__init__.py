"""Studies whose tables are in docs/: each is one command that makes all of its figures."""
