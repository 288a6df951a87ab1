"""`python -m train` is the `train-sae` command."""

from train.cli import main

main(prog_name="train-sae")
