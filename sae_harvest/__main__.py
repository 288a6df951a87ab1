"""`python -m sae_harvest`: the four commands as one."""

import click

from sae_harvest.harvest.commands.cli import main as harvest
from sae_harvest.pipelines.cli import main as sae_pipeline
from sae_harvest.pipelines.evaluate.cli import main as train_sae
from sae_harvest.pipelines.features.commands.cli import main as sae_features


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Run one of the four commands of sae-harvest.

    \b
    python -m sae_harvest harvest run --model gpt2 --layer 8
    """


main.add_command(harvest, "harvest")
main.add_command(train_sae, "train-sae")
main.add_command(sae_features, "sae-features")
main.add_command(sae_pipeline, "sae-pipeline")

if __name__ == "__main__":
    main(prog_name="python -m sae_harvest")
