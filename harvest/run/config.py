"""Configuration of a harvest: one object for the command line, a file and Python."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.common.numbers import Count
from sae_harvest.harvest.text.corpus import CorpusSpec
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

    model: str = Field(description="hub id, folder, .gguf file, or smollm2-135m")
    model_revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub model"
    )
    corpus: CorpusSpec = Field(description="where the text comes from")
    sites: tuple[str, ...] = Field(min_length=1, description="for example resid_post.12")
    tokens: Annotated[Count, Field(gt=0)] | Literal["all"] = Field(
        default="all",
        description="tokens to store; as many whole shards as hold them are harvested. all: every "
        "whole context of the corpus, the last shard a short one. A dataset of the hub is read to "
        "its end only where all is said",
    )
    context_length: Count = Field(default=128, gt=1, description="tokens per context")
    bos: Literal["auto", "none", "context"] = Field(
        default="auto", description="auto: as the tokenizer itself does"
    )
    seed: Count = Field(default=0, ge=0, description="of the shuffling of contexts")
    keep_text: bool = Field(
        default=False, description="store the documents' texts beside their sources"
    )
    dtype: Literal["float16", "float32", "int8"] = Field(
        default="float16", description="of the stored activations"
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="of the forward pass; auto: bfloat16 where it is fast"
    )
    batch_tokens: Count = Field(
        default=DEFAULT_BATCH_TOKENS, gt=0, description="tokens per forward pass"
    )
    shard_rows: Count | None = Field(
        default=None,
        gt=0,
        le=MAX_SHARD_ROWS,
        description="rows per shard, rounded down to whole contexts; by itself that of the store "
        "that is continued, else 65,536 on a GPU and about half a minute's on a CPU (4,096 to "
        "65,536, by the size of the model), or all rows of a smaller harvest",
    )
