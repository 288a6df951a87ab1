"""Feature passes over rows made by hand, without a store or a model, beside their dense matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from click.testing import CliRunner
from torch import Tensor

from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.pipelines.features.counting.candidates import TokenRows
from sae_harvest.pipelines.features.counting.neighbours import Neighbours, neighbours
from sae_harvest.pipelines.features.counting.profile import Profile, profile
from sae_harvest.pipelines.features.encoding.encode import batches, encode
from sae_harvest.pipelines.features.encoding.firings import Blocks, publish
from sae_harvest.pipelines.features.tables import writers as tables
from sae_harvest.pipelines.features.tables.contexts import contexts, wanted_rows
from sae_harvest.pipelines.features.tables.folder import TABLES
from sae_harvest.pipelines.features.tables.rows import COLUMNS, READ, SCORE, Rows
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from tests.dictionaries import random_sae

N_LATENTS, K, LENGTH, CONTEXTS, VOCABULARY = 13, 4, 16, 40, 30
ALWAYS, TINY, HUGE, ALIKE, ONCE, NEVER = 0, 8, 9, 10, 11, 12  # latents with a fate
CONFIG = FeatureConfig(
    n_top=5, n_decile=3, n_random=4, n_inactive=4, n_hard=6, window_tokens=7, n_neighbours=3,
    n_tokens=6,
)  # fmt: skip


@dataclass
class Case:
    """Rows of a made-up store, arrays [rows]; whole contexts of `length` rows.

    indices, values [rows, k]: what its encoder says of each row, also of those not read.
    """

    length: int
    n_latents: int
    read: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray
    scores: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.tokens)

    @property
    def dense(self) -> np.ndarray:
        """float64 [rows, n_latents]; 0 where nothing fired or nothing was read."""
        dense = np.zeros((self.n_rows, self.n_latents))
        for row in np.flatnonzero(self.read):
            for latent, value in zip(self.indices[row], self.values[row], strict=True):
                dense[row, latent] += value
        return dense

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As an SAE's, of rows [batch, 1] that hold their number."""
        rows = x[:, 0].long().numpy()
        return torch.from_numpy(self.indices[rows]), torch.from_numpy(self.values[rows])


def made_case(length: int = LENGTH, n_contexts: int = CONTEXTS, seed: int = 0) -> Case:
    """Many ties, unread rows, values beyond both ends of the histogram, latents with a fate."""
    rng = np.random.default_rng(seed)
    n_rows = length * n_contexts
    read = rng.random(n_rows) < 0.85
    indices = np.stack([rng.permutation(np.arange(1, 10))[:K] for _ in range(n_rows)])
    indices[rng.random(n_rows) < 0.6, 0] = ALWAYS
    # quarters, so that there are many ties; most other places did not fire
    values = (rng.integers(1, 20, indices.shape) / 4).astype(np.float32)
    values[(rng.random(indices.shape) < 0.7) & (indices != ALWAYS)] = 0
    read[[100, 200]] = True
    indices[100, :2], values[100, :2] = (ONCE, ALIKE), (3.25, 2.5)
    indices[200, 1], values[200, 1] = ALIKE, np.nextafter(np.float32(2.5), np.float32(3))
    values[indices == HUGE] *= 1e5  # beyond the last edge of the histogram
    values[indices == TINY] *= 1e-5  # before the first
    # documents of 1 to 60 rows that do not respect contexts; -1 for the first row of some contexts
    documents = np.repeat(np.arange(n_rows), rng.integers(1, 60, n_rows))[:n_rows].astype(np.int64)
    documents[::length][rng.random(n_contexts) < 0.5] = -1
    return Case(
        length,
        N_LATENTS,
        read,
        indices.astype(np.int32),
        values,
        rng.integers(0, VOCABULARY, n_rows).astype(np.int32),
        documents,
        (documents % 3 == 0),
    )


def sparse_case(n_latents: int, row: np.ndarray, value: np.ndarray, length: int = 8) -> Case:
    """Every latent fires alike: with value[i] on row[i]; one token, one document a row."""
    n_rows = int(-(-(row.max() + 1) // length) * length)
    values = np.zeros((n_rows, n_latents), np.float32)
    values[row] = value[:, None]
    return Case(
        length,
        n_latents,
        np.ones(n_rows, np.bool_),
        np.tile(np.arange(n_latents, dtype=np.int32), (n_rows, 1)),
        values,
        np.zeros(n_rows, np.int32),
        np.arange(n_rows),
        np.zeros(n_rows, np.bool_),
    )


def write_rows(case: Case, out: Path) -> Rows:
    """What a build knows of its rows."""
    (out / "rows").mkdir(parents=True, exist_ok=True)
    split = case.read * np.uint8(READ) | case.scores * np.uint8(SCORE)
    columns = {"token": case.tokens, "document": case.documents, "split": split}
    for name, dtype in COLUMNS.items():
        np.save(out / "rows" / f"{name}.npy", columns[name].astype(dtype))
    return Rows(out)


def encode_blocks(
    case: Case,
    out: Path,
    n_contexts: int = 4,
    numbers: Iterable[int] | None = None,
    batch_rows: int = 50,
    chunk_rows: int = 70,
) -> Blocks:
    """Encode blocks of so many contexts: those with these numbers, in this order, or all."""
    blocks = Blocks(out, case.n_rows, n_contexts * case.length, case.n_latents)
    for block in range(len(blocks)) if numbers is None else numbers:
        first, last = blocks.span(block)
        given = batches(_numbers, case.read[first:last], first, chunk_rows, batch_rows)
        publish(LocalObjects(out), block, encode(case, case.n_latents, first, given, Event()))
    return blocks


def _numbers(first: int, last: int) -> np.ndarray:
    """What `Case.encode` takes."""
    return np.arange(first, last, dtype=np.float32)[:, None]


class Texts:
    """Texts of tokens without a tokenizer."""

    def of(self, ids: np.ndarray) -> pa.Array:
        return pa.array([f" t{i}" for i in ids.reshape(-1).tolist()], pa.string())

    def windows(self, ids: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        texts = [[f" t{i}" for i in line] for line in ids.tolist()]
        lengths = np.array([[len(text) for text in line] for line in texts], np.int32)
        joined = pa.array(["".join(line) for line in texts], pa.string())
        return joined, lengths.reshape(ids.shape).cumsum(axis=1, dtype=np.int32)


@dataclass
class Pass:
    """A whole pass but for the files of its tables; latents in pieces, as workers take them."""

    profiles: list[Profile]
    near: list[Neighbours]
    tables: dict[str, pa.Table]
    others: np.ndarray
    drawn: np.ndarray
    token_rows: TokenRows


def weights_of(n_latents: int) -> dict[str, np.ndarray]:
    """W_enc and W_dec [n_latents, 6], b_enc [n_latents]."""
    rng = np.random.default_rng(1)
    return {
        "W_enc": rng.standard_normal((n_latents, 6)).astype(np.float32),
        "W_dec": rng.standard_normal((n_latents, 6)).astype(np.float32) * 3,
        "b_enc": rng.standard_normal(n_latents).astype(np.float32),
    }


def whole_pass(
    case: Case,
    out: Path,
    config: FeatureConfig = CONFIG,
    n_contexts: int = 4,
    pieces: int = 1,
    share: float = 1.0,
) -> Pass:
    """Everything that is counted, from rows encoded in blocks of so many contexts."""
    rows, blocks = write_rows(case, out), encode_blocks(case, out, n_contexts)
    n, length = case.n_latents, case.length
    texts: Any = Texts()
    weights = weights_of(n)
    W_dec = torch.from_numpy(weights["W_dec"])
    edges = np.linspace(0, n, pieces + 1).astype(int).tolist()
    spans = list(pairwise(edges))
    profiles = [profile(blocks, rows, length, config, *span) for span in spans]
    near = [neighbours(blocks, length, W_dec, config.n_neighbours, share, *s) for s in spans]
    others = np.concatenate([np.hstack([x.alike[:, :2], x.along[:, :2]]) for x in near])
    random = [p.kept.random for p in profiles]
    drawn = np.concatenate([np.where(r.used, r.row, -1) for r in random])
    token_rows = TokenRows(rows, config.seed)
    shown = []
    for p, (first, last) in zip(profiles, spans, strict=True):
        wanted = wanted_rows(p.kept, others, drawn, token_rows, case.n_rows, config, first, last)
        shown.append(contexts(blocks, rows, length, config, texts, wanted, first, last))
    n_read, n_all = int(case.read.sum()), case.n_rows // length
    latents = [tables.latents_table(p, n_read, n_all, weights, None, texts) for p in profiles]
    parts = [tables.tokens_part(p, config) for p in profiles]
    made = {
        "latents": latents,
        "histograms": [tables.histograms_table(p) for p in profiles],
        "neighbours": [tables.neighbours_table(x) for x in near],
        "tokens": list(tables.tokens_tables(parts, texts)),
        "contexts": shown,
    }
    joined = {name: pa.concat_tables(parts) for name, parts in made.items()}
    return Pass(profiles, near, joined, others, drawn, token_rows)


# Builds over the fixture store.

BUILD_CONFIG = FeatureConfig(
    n_top=4, n_decile=1, n_random=3, n_inactive=3, n_hard=4, window_tokens=9, n_neighbours=3,
    n_tokens=5, n_logits=6,
)  # fmt: skip
RULE = RowRule(max_norm_medians=1.2, heldout_fraction=0.3)  # leaves out about a tenth of the rows
SAE_LATENTS, DEAD = 48, 7
ENTRIES = {f"{name}.parquet" for name in TABLES} | {"firings", "run.json"}


def save_sae(store: Path, folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A random dictionary with one latent that never fires."""
    opened = ActivationStore.open(store)
    sae = random_sae(opened, SAE_LATENTS, fields.pop("k", 6), RULE, seed, **fields)
    sae.b_enc[DEAD] = -1e6
    sae.save(folder)
    return folder


def contents(features: Path) -> dict[str, bytes]:
    """Every file of a folder by its path, run.json left out."""
    files = sorted(path for path in features.rglob("*") if path.is_file())
    return {
        path.relative_to(features).as_posix(): path.read_bytes()
        for path in files
        if path.name != "run.json"
    }


def assert_same_files(one: Path, other: Path) -> None:
    """Two finished builds of the same: byte for byte, with nothing beside the tables."""
    entries = {path.name for path in one.iterdir()}
    assert entries == ENTRIES, entries ^ ENTRIES
    here, there = contents(one), contents(other)
    assert here.keys() == there.keys(), here.keys() ^ there.keys()
    differing = [name for name in here if here[name] != there[name]]
    assert differing == [], differing


def read_table(folder: Path, name: str) -> list[dict[str, Any]]:
    """A table as any reader of Parquet sees it."""
    result = duckdb.connect().execute(f"FROM '{folder}/{name}.parquet'")
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def tokens_of(context: dict[str, Any]) -> list[str]:
    """The texts of a context's tokens."""
    ends = context["token_ends"]
    return [context["text"][a:b] for a, b in pairwise([0, *ends])]


def refusal(*arguments: object) -> str:
    """The one sentence that the command ends with."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == ""
    return sentence(result.stderr)


def sentence(told: str) -> str:
    """The one error in what a command told; its progress bar aside."""
    lines = [line for line in told.strip().splitlines() if line.startswith("Error: ")]
    assert lines == told.strip().splitlines()[-1:], told
    assert lines[0].endswith("."), told
    assert "Traceback" not in told
    return lines[0].removeprefix("Error: ")


def build_refusal(store: Path | str, sae: Path, out: Path, *options: object) -> str:
    return refusal("build", "--store", store, "--sae", sae, "--out", out, *options)
