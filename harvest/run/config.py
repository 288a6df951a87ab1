"""Configuration of a harvest: one object for the command line, a file and Python."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sae_harvest.common.numbers import Count
from sae_harvest.common.options import name_or_path
from sae_harvest.common.settings import Option
from sae_harvest.harvest.text.documents import CorpusSpec
from sae_harvest.store.layout import MAX_SHARD_ROWS

DEFAULT_BATCH_TOKENS = 2048
GPU_SHARD_ROWS = 65_536


class HarvestConfig(BaseModel):
    """The configuration of a harvest. The store's plan is made from it, with "auto" decided.

    >>> from sae_harvest import CorpusSpec
    >>> HarvestConfig(
    ...     model="gpt2", corpus=CorpusSpec(name="news"), sites=("resid_post.8",), tokens="1M"
    ... ).tokens
    1000000
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, AfterValidator(name_or_path("smollm2-135m")), Option("Model", "NAME")] = (
        Field(description="model: Hub id, folder, .gguf file, or smollm2-135m")
    )
    model_revision: Annotated[str | None, Option("Model")] = Field(
        None, description="branch, tag or commit of the Hub model"
    )
    corpus: Annotated[CorpusSpec, Option("Text")] = Field(
        CorpusSpec(), description="where the text comes from"
    )
    sites: Annotated[tuple[str, ...], Option("Store", "KIND.LAYER", "--site")] = Field(
        min_length=1,
        description="sites to record, such as resid_post.12; kinds: resid_pre, resid_mid, "
        "resid_post, attn_out, mlp_out, mlp_act (the neurons)",
    )
    tokens: Annotated[Annotated[Count, Field(ge=1)] | Literal["all"], Option("Store", "TOKENS")] = (
        Field(
            "all",
            description="tokens to store, rounded up to whole shards; more than before "
            "makes a store longer; all: every whole context of the corpus, with a shorter last "
            "shard. A Hub dataset is read to its end only if all is given",
        )
    )
    context_length: Annotated[Count, Option("Contexts", "TOKENS")] = Field(
        128, ge=2, description="tokens that the model sees at a time"
    )
    bos: Annotated[Literal["auto", "none", "context"], Option("Contexts")] = Field(
        "auto",
        description="BOS token at position 0 of each context; auto: as the tokenizer itself does",
    )
    seed: Annotated[Count, Option("Contexts")] = Field(
        0, ge=0, description="seed for shuffling the contexts"
    )
    keep_text: Annotated[bool, Option("Text")] = Field(
        False, description="store the texts of the documents as well"
    )
    dtype: Annotated[Literal["float16", "float32", "int8"], Option("Store")] = Field(
        "float16",
        description="type of the stored activations; int8 has a scale per channel and shard",
    )
    compute_dtype: Annotated[Literal["auto", "bfloat16", "float32"], Option("Execution")] = Field(
        "auto", description="type of the forward pass; auto: bfloat16 where that is fast"
    )
    batch_tokens: Annotated[Count, Option("Execution", "TOKENS")] = Field(
        DEFAULT_BATCH_TOKENS, ge=1, description="tokens per forward pass"
    )
    shard_rows: Annotated[Count | None, Option("Store", "ROWS")] = Field(
        None,
        ge=1,
        le=MAX_SHARD_ROWS,
        description="rows per shard, rounded down to whole contexts; a killed worker loses up to "
        "one shard; none: as in the store that is continued, else 65,536 on a GPU and about half a "
        "minute's rows on a CPU (4,096 to 65,536, by the size of the model), or all rows of a "
        "smaller harvest",
    )
