"""From a request to a plan: find model, tokenizer and corpus; decide everything automatic."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from sae_harvest.common.errors import InputError
from sae_harvest.common.parsing import first_line
from sae_harvest.common.paths import absolute
from sae_harvest.harvest.model.models import (
    ResolvedModel,
    load_config,
    load_tokenizer,
    mlp_width,
    model_fingerprint,
    pick_dtype,
    resolve_model,
    tokenizer_fingerprint,
)
from sae_harvest.harvest.model.sites import Site
from sae_harvest.harvest.run.config import GPU_SHARD_ROWS, HarvestConfig
from sae_harvest.harvest.text.corpus import Corpus, CorpusSpec, HubCorpus, open_corpus
from sae_harvest.harvest.tokens.contexts import WINDOW_CONTEXTS, default_bos
from sae_harvest.harvest.tokens.encoding import end_of_text_id
from sae_harvest.store.layout import Plan, PlanSettings, SitePlan

CPU_SHARD_SECONDS = 30
CPU_OPERATIONS_A_SECOND = 100 * 10**9  # measured with SmolLM2-135M on two cores
MIN_SHARD_ROWS = 4096

ALL_SHARDS = 1 << 40  # more than any corpus fills
BYTES_PER_TOKEN = 8  # most bytes of a file per token; compressed files are not counted

LIBRARIES = ("sae-harvest", "torch", "transformers", "tokenizers", "pyarrow", "numpy")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with everything automatic decided, before any model is loaded."""

    config: HarvestConfig
    """The request."""
    model: ResolvedModel
    """The model's files."""
    tokenizer: Any
    """The model's tokenizer."""
    corpus: Corpus
    """The text."""
    settings: PlanSettings
    """The plan without the sites, whose widths are not known yet."""

    def plan(self, widths: dict[str, int]) -> Plan:
        sites = tuple(SitePlan(name=s, width=widths[s]) for s in self.config.sites)
        return Plan(sites=sites, **dict(self.settings))

    @property
    def min_contexts(self) -> int:
        """Contexts that hold the requested tokens; 1 for `all`."""
        if self.config.tokens == "all":
            return 1
        return -(-self.config.tokens // self.config.context_length)

    @property
    def n_shards(self) -> int:
        """Whole shards that hold the requested tokens; `ALL_SHARDS` for `all`."""
        if self.config.tokens == "all":
            return ALL_SHARDS
        return -(-self.min_contexts // self.settings.contexts_per_shard)

    @property
    def may_be_short(self) -> bool:
        """True if the corpus is so small that it may have too few tokens."""
        tokens, n_bytes = self.config.tokens, self.corpus.n_bytes
        min_tokens = self.config.context_length if tokens == "all" else tokens
        return n_bytes is not None and n_bytes < BYTES_PER_TOKEN * min_tokens


def prepare(config: HarvestConfig, existing: Plan | None, device: str) -> Prepared:
    """Resolve model, tokenizer and corpus, and decide what is automatic.

    Args:
        existing: the plan of the store that is continued. It decides the compute dtype and the
            size of shards if the request does not, so that another processor, or a request for
            more tokens, can continue a harvest.

    Raises:
        InputError: unknown model or corpus, layer out of range, contexts too long for the model.
    """
    model = resolve_model(config.model, config.model_revision)
    model_config = load_config(model)
    sites = [Site.parse(name) for name in config.sites]
    for site in sites:
        site.check(model_config)
    if len(set(sites)) < len(sites):
        raise InputError(f"A site is named twice in {', '.join(config.sites)}.")
    text_config = model_config.get_text_config(decoder=True)
    check_context_length(text_config, config.model, config.context_length)
    tokenizer = load_tokenizer(model)
    corpus = open_corpus(config.corpus)
    if isinstance(corpus, HubCorpus) and "tokens" not in config.model_fields_set:
        raise InputError(
            f"The dataset {corpus.name} is streamed, and may be larger than any disk; say how many "
            "tokens to take, with --tokens 1M say, or --tokens all."
        )
    compute_dtype: str = config.compute_dtype
    if compute_dtype == "auto":
        compute_dtype = existing.compute_dtype if existing else pick_dtype(device)
    length = config.context_length
    shard_rows = config.shard_rows
    if shard_rows is None:
        usual = default_shard_rows(model_config, max(site.layer for site in sites), device)
        shard_rows = existing.shard_rows if existing else usual
        if not existing and config.tokens != "all":
            shard_rows = min(shard_rows, -(-config.tokens // length) * length)
    settings = PlanSettings(
        model=model_fingerprint(model) | {"name": model_name(model)},
        tokenizer={
            "xxh3": tokenizer_fingerprint(tokenizer),
            "vocabulary": len(tokenizer),
            "end_of_text": end_of_text_id(tokenizer),
            "beginning_of_text": tokenizer.bos_token_id,
        },
        corpus=config.corpus.model_dump(mode="json")
        | {"name": corpus.full_name, "fingerprint": corpus.fingerprint()},
        context_length=length,
        contexts_per_shard=max(1, shard_rows // length),
        bos=default_bos(tokenizer) if config.bos == "auto" else config.bos,
        seed=config.seed,
        window_contexts=WINDOW_CONTEXTS,
        document_text=config.keep_text,
        dtype=config.dtype,
        compute_dtype=compute_dtype,
        batch_contexts=max(1, config.batch_tokens // length),
    )
    return Prepared(config, model, tokenizer, corpus, settings)


def check_context_length(config: Any, model: str, context_length: int) -> None:
    """Raise `InputError` if contexts are too long for a model; some have no limit (XLNet: -1)."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and 0 < longest < context_length:
        raise InputError(
            f"{model} sees at most {longest} tokens at a time, got contexts of {context_length}; "
            f"use --context-length {longest} or less."
        )


def default_shard_rows(config: PreTrainedConfig, last_layer: int, device: str) -> int:
    """Choose the rows of a shard: an interrupted harvest loses up to one shard of work.

    On a CPU, about half a minute of work for two idle cores. The number depends on the request
    alone, not on a measured speed, so that machines that harvest parts of a store agree. Fewer rows
    than 4,096 would waste bytes: the commit record of a shard is as large as about 50 rows.
    """
    if device != "cpu":
        return GPU_SHARD_ROWS
    text = config.get_text_config(decoder=True)
    width: int = text.hidden_size
    hidden: int = mlp_width(config) or 4 * width
    # For blocks with attention and a gated MLP; two operations per weight and token.
    operations = 2 * (last_layer + 1) * (4 * width**2 + 3 * width * hidden)
    rows = CPU_SHARD_SECONDS * CPU_OPERATIONS_A_SECOND // operations
    return min(GPU_SHARD_ROWS, max(MIN_SHARD_ROWS, 1 << rows.bit_length() >> 1))


def prepare_again(plan: Plan, device: str) -> Prepared:
    """Prepare the request of an existing store again, from its plan.

    Raises:
        InputError: model or corpus are gone, or have changed.
    """
    try:
        config = _config_of(plan)
    except ValidationError as error:
        raise InputError(f"The plan of this store is not valid: {first_line(error)}.") from None
    prepared = prepare(config, plan, device)
    plan_now = prepared.plan({site.name: site.width for site in plan.sites})
    if differing := plan.differing_fields(plan_now):
        raise InputError(
            f"The sources of the store have changed: {'; '.join(differing)}; restore them."
        )
    return prepared


def _config_of(plan: Plan) -> HarvestConfig:
    """Return the request of a plan, for one token."""
    length = plan.context_length
    corpus = {name: plan.corpus.get(name) for name in CorpusSpec.model_fields}
    return HarvestConfig(
        model=plan.model["name"],
        model_revision=plan.model.get("revision"),
        corpus=CorpusSpec.model_validate(corpus),
        sites=tuple(site.name for site in plan.sites),
        tokens=1,
        context_length=length,
        bos=plan.bos,
        seed=plan.seed,
        keep_text=plan.document_text,
        dtype=plan.dtype,
        compute_dtype=plan.compute_dtype,
        batch_tokens=plan.batch_contexts * length,
        shard_rows=plan.shard_rows,
    )


def versions() -> dict[str, str]:
    """Return versions of the libraries that decide the bytes, for provenance."""
    return {name: version(name) for name in LIBRARIES}


def model_name(model: ResolvedModel) -> str:
    """Return the model's name for the plan; a path is absolute, so that any folder finds it."""
    if model.kind == "directory":
        return model.path
    if model.name.endswith(".gguf"):
        return str(Path(absolute(model.name)).resolve())
    return model.name
