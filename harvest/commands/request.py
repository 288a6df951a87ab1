"""What `harvest plan` and `harvest run` are asked for, as command-line options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from sae_harvest.common.console import device_option
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import NameOption

DEFAULT_CORPUS = "news"


class TokensOption(CountRange):
    """A count of tokens, or `all`."""

    name = "count|all"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return "all" if value == "all" else super().convert(value, param, ctx)


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `plan` and `run` share."""
    options = [
        click.option(
            "--model",
            required=True,
            type=NameOption("smollm2-135m"),
            help="Model: Hub id, folder, .gguf file, or smollm2-135m.",
        ),
        click.option("--model-revision", help="Branch, tag or commit of the Hub model."),
        click.option(
            "--corpus",
            type=NameOption(DEFAULT_CORPUS),
            default=DEFAULT_CORPUS,
            show_default=True,
            help="Text: a dataset on the Hub; a text, JSONL, CSV or Parquet file; a folder or"
            " s3:// "
            "prefix of such files; or news, the packaged articles.",
        ),
        click.option("--dataset-config", help="Configuration of the Hub dataset."),
        click.option(
            "--split", default="train", show_default=True, help="Split of the Hub dataset."
        ),
        click.option("--revision", help="Branch, tag or commit of the Hub dataset."),
        click.option(
            "--text-column", help="Column that holds the text. Default: a usual one, such as text."
        ),
        click.option("--dedup", is_flag=True, help="Leave out documents whose text came before."),
        click.option("--keep-text", is_flag=True, help="Store the texts of the documents as well."),
        click.option(
            "--layer",
            type=int,
            multiple=True,
            help="Number N of a layer, for the site resid_post.N.",
        ),
        click.option(
            "--site",
            multiple=True,
            help="KIND.LAYER, several times for several; kinds: resid_pre, resid_mid, resid_post, "
            "attn_out, mlp_out, mlp_act (the neurons).",
        ),
        click.option(
            "--tokens",
            type=TokensOption(),
            help="Tokens to store, in whole shards; more than before makes a store longer.  "
            "[default: all that the corpus holds; a hub dataset wants a number, or all]",
        ),
        click.option(
            "--context-length",
            type=CountRange(min=2),
            default=128,
            show_default=True,
            help="Tokens the model sees at a time.",
        ),
        click.option(
            "--bos",
            type=click.Choice(["auto", "none", "context"]),
            default="auto",
            show_default=True,
            help="BOS token at position 0 of each context; auto does as the tokenizer does.",
        ),
        click.option(
            "--seed",
            type=CountRange(min=0),
            default=0,
            show_default=True,
            help="Seed for shuffling the contexts.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float16", "float32", "int8"]),
            default="float16",
            show_default=True,
            help="Type of the stored activations. int8 has a scale per channel and shard.",
        ),
        click.option(
            "--compute-dtype",
            type=click.Choice(["auto", "bfloat16", "float32"]),
            default="auto",
            show_default=True,
            help="Type of the forward pass; auto is bfloat16 where that is fast.",
        ),
        click.option(
            "--shard-rows",
            type=CountRange(min=1),
            help="Rows per shard: what a killed worker loses. Default: 65,536 on a GPU, about "
            "half a minute's on a CPU.",
        ),
        device_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def make_config(given: dict[str, Any]) -> Any:
    """The HarvestConfig of the options; a usage error if no site was named."""
    from sae_harvest.harvest.run.config import HarvestConfig
    from sae_harvest.harvest.text.corpus import CorpusSpec

    sites = tuple(given["site"]) + tuple(f"resid_post.{layer}" for layer in given["layer"])
    if not sites:
        raise click.UsageError("Name what to record: --layer 8, or --site mlp_out.8.")
    corpus = CorpusSpec(
        name=given["corpus"],
        config=given["dataset_config"],
        split=given["split"],
        revision=given["revision"],
        text_column=given["text_column"],
        dedup=given["dedup"],
    )
    same = (
        "model",
        "model_revision",
        "keep_text",
        "context_length",
        "bos",
        "seed",
        "dtype",
        "compute_dtype",
        "shard_rows",
    )
    values = {name: given[name] for name in same}
    if given["tokens"] is not None:
        values["tokens"] = given["tokens"]
    return HarvestConfig(corpus=corpus, sites=sites, **values)


def parse_shards(text: str | None) -> range | None:
    """`4:8` as range(4, 8); a usage error for anything else."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise click.UsageError(f"--shards {text} is not FIRST:LAST, such as 0:100.")
    return range(int(first), int(last))
