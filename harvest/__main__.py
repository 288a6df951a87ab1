"""`python -m harvest` is the `harvest` command."""

from harvest.cli import main

main(prog_name="harvest")
