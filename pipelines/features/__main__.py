"""`python -m pipelines.features` is the `sae-features` command."""

from pipelines.features.cli import main

main(prog_name="sae-features")
