"""`python -m pipelines` is the `sae-pipeline` command."""

from pipelines.cli import main

main(prog_name="sae-pipeline")
