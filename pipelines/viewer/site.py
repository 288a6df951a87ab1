"""The viewer's pages as files that open from a disk, a file share or any web server.

    OUT/index.html static/…          the same pages
    OUT/data/a/start.js              figures and plots of the start page
    OUT/data/a/summary.js            the columns of the list of latents
    OUT/data/a/latents/12.js         pages of `PER_FILE` latents
    OUT/data/a/tokens/7f.js          latents by token; a hash of the token gives the file
    OUT/data/a/words/7f.js           latents by word of their contexts; a hash gives the file
    OUT/data/b/…, data/compare.js    the SAE of --compare
    OUT/data/matches/split/0.js      pairs of a class, from --matches

Pages from a disk cannot fetch data, but they can load scripts. So each data file is a script that
passes JSON to the page.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.exports.files import new_folder
from sae_harvest.pipelines.viewer.compare import Comparison
from sae_harvest.pipelines.viewer.explained import explained
from sae_harvest.pipelines.viewer.latent import BIN, CONTEXT, NEIGHBOUR, assemble
from sae_harvest.pipelines.viewer.matches import PAGE, Matches
from sae_harvest.pipelines.viewer.overview import overview
from sae_harvest.pipelines.viewer.search import FOUND, SPECIFIC
from sae_harvest.pipelines.viewer.tables import SUMMARY, Tables

STATIC = Path(__file__).parent / "static"
PER_FILE = 4  # latents per file
READ_AT_ONCE = 512  # latents per query
SHARES = 256  # number of files for tokens, and for words
MODE, CHARSET = 'data-mode="server"', '<meta charset="utf-8">'
# The server sends this policy as a header; for pages from a disk 'self' matches nothing.
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'self' file:; base-uri 'none'; object-src 'none'\">"
)

BY_TOKEN = SPECIFIC.format(key="lower(trim(text))", condition="", found=FOUND)
# A word is a run of letters and digits; the peak's words are those around the row's token.
BY_WORD = """
    WITH firing AS (
        SELECT latent, activation / max AS strength, lower(text) AS text,
            position - window_start AS place,
            lower(contexts.text[1:coalesce(token_ends[place], 0)]) AS before,
            lower(contexts.text[coalesce(token_ends[place], 0) + 1:token_ends[place + 1]]) AS peak
        FROM contexts JOIN (SELECT latent, max FROM summary) USING (latent)
        WHERE activation > 0 AND latent BETWEEN ? AND ?
    ), worded AS (
        SELECT latent, strength,
            list_distinct(regexp_extract_all(text, '[\\p{L}\\p{N}]+')) AS words,
            regexp_extract_all(regexp_extract(before, '[\\p{L}\\p{N}]*$') || peak ||
                regexp_extract(substr(text, length(before) + length(peak) + 1),
                    '^[\\p{L}\\p{N}]*'), '[\\p{L}\\p{N}]+') AS at_peak
        FROM firing
    ), single AS (
        SELECT latent, strength, unnest(words) AS word, list_contains(at_peak, word) AS on_peak
        FROM worded
    )
    SELECT word, latent, round(coalesce(sum(strength) FILTER (on_peak), 0), 2) AS at_peak,
        round(sum(strength), 2) AS at_all
    FROM single GROUP BY ALL ORDER BY word, latent
"""


OnProgress = Callable[[str, int, int], None]  # phase, latents done, total of latents


@dataclass(frozen=True)
class Size:
    """Size of the files that were written."""

    n_files: int
    """Number of files."""

    n_bytes: int
    """Sum of their sizes in bytes."""


def write_site(
    features: Path,
    compare: Path | None,
    out: Path,
    on_progress: OnProgress = lambda phase, done, total: None,
    saes: Sequence[Path] = (),
    matches: Path | None = None,
) -> Size:
    """Export the pages of one SAE, or of two, into a new folder.

    Args:
        on_progress: called with the phase, latents done and the total of latents.
        saes: folders of the compared SAEs, if they have moved.
        matches: folder that `sae-features diff` wrote for the two SAEs.

    Raises:
        RunError: a folder holds no tables, or no matches of these SAEs, or `out` is not empty.
        InputError: `matches` without `compare`, or the SAEs cannot be compared.
    """
    if matches is not None and compare is None:
        raise InputError("Matches are of two SAEs; give the tables of the second with --compare.")
    with new_folder(out) as folder:
        tables = Tables(features, seconds=3600)
        other = Tables(compare, seconds=3600) if compare is not None else None
        comparison = Comparison(tables, other, saes) if other is not None else None
        about = {"compare": comparison.overview() if comparison else None, "matches": None}
        if matches is not None and other is not None:
            found = Matches(matches, tables, other)
            about["matches"] = found.overview()
            _write_matches(found, folder / "data")
        shutil.copytree(STATIC, folder / "static", ignore=shutil.ignore_patterns("index.html"))
        page = (STATIC / "index.html").read_text()
        assert MODE in page
        assert CHARSET in page
        page = page.replace(MODE, 'data-mode="site"').replace(CHARSET, f"{CHARSET}\n{POLICY}")
        (folder / "index.html").write_text(page)
        for name, one in (("a", tables), ("b", other)):
            if one is not None:
                nearest = comparison if one is tables else None
                _write_tables(one, folder / "data", name, about, nearest, on_progress)
        if comparison is not None:
            _write(folder / "data", "compare", comparison.columns())
        files = [path for path in folder.rglob("*") if path.is_file()]
        return Size(len(files), sum(path.stat().st_size for path in files))


def _write_tables(
    tables: Tables,
    data: Path,
    name: str,
    about: dict[str, Any],
    comparison: Comparison | None,
    on_progress: OnProgress,
) -> None:
    options = {
        "sql": False,
        "explanations": False,  # the files cannot search explanations; a latent's page shows them
        "per_file": PER_FILE,
        "shares": SHARES,
    }
    start = overview(tables) | about | options
    _write(data, f"{name}/start", start)
    summary = tables.ask(
        f"SELECT {', '.join(SUMMARY)}, dead, label, tokens FROM summary ORDER BY latent"
    )
    columns = {key: [row[key] for row in summary] for key in (*SUMMARY, "dead", "label", "tokens")}
    _write(data, f"{name}/summary", columns)
    for number, pages in _pages(tables, comparison):
        _write(data, f"{name}/latents/{number}", pages)
        on_progress(
            "writing pages", min((number + 1) * PER_FILE, tables.n_latents), tables.n_latents
        )
    by_token: dict[str, list[Any]] = defaultdict(list)
    for row in tables.ask(BY_TOKEN):
        by_token[row.pop("key")].append(list(row.values()))
    _write_shares(data, f"{name}/tokens", by_token)
    _write_shares(data, f"{name}/words", _words(tables, on_progress))


def _write_matches(matches: Matches, data: Path) -> None:
    """Write the pairs of each class, a page to a file."""
    for kind in matches.overview()["classes"]:
        for offset in range(0, max(1, kind["pairs"]), PAGE):
            page = matches.page(kind["name"], offset)
            _write(data, f"matches/{kind['name']}/{offset // PAGE}", page)


def _pages(
    tables: Tables, comparison: Comparison | None
) -> Iterator[tuple[int, dict[int, dict[str, Any]]]]:
    """Yield the number of each file and its pages by latent."""
    for first in range(0, tables.n_latents, READ_AT_ONCE):
        last = min(first + READ_AT_ONCE, tables.n_latents) - 1
        statistics = tables.ask("SELECT * FROM latents WHERE latent BETWEEN ? AND ?", first, last)
        parts: list[dict[int, list[dict[str, Any]]]] = []
        for sql in (
            f"SELECT latent, {BIN} FROM histograms WHERE latent BETWEEN ? AND ? ORDER BY ALL",
            f"SELECT latent, {NEIGHBOUR} FROM neighbours WHERE latent BETWEEN ? AND ?",
            f"SELECT latent, {CONTEXT} FROM contexts WHERE latent BETWEEN ? AND ?",
        ):
            rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for row in tables.ask(sql, first, last):
                rows[row.pop("latent")].append(row)
            parts.append(rows)
        histograms, near, contexts = parts
        documents = tables.titles([c["document"] for cs in contexts.values() for c in cs])
        others = [n["other"] for ns in near.values() for n in ns]
        labels = tables.labels([*range(first, last + 1), *others])
        explanations = tables.explanations(first, last)
        programs = tables.programs(first, last)
        scored = explained(tables, first, last)
        pages = {}
        for row in statistics:
            latent = row["latent"]
            pages[latent] = assemble(
                tables,
                row,
                histograms[latent],
                near[latent],
                contexts[latent],
                documents,
                labels,
                explanations.get(latent),
                programs.get(latent, []),
                scored.get(latent),
            )
            if comparison is not None:
                pages[latent]["nearest"] = comparison.of(latent)
        for number in range(first // PER_FILE, last // PER_FILE + 1):
            inside = range(number * PER_FILE, min((number + 1) * PER_FILE, last + 1))
            yield number, {latent: pages[latent] for latent in inside}


def _words(tables: Tables, on_progress: OnProgress) -> dict[str, list[list[float]]]:
    """Return [latent, strength at the peak, strength] of the `FOUND` best latents of each word.

    The strength is the sum of the latent's activations in contexts with the word, each as a share
    of the latent's maximum. The strength at the peak counts only contexts whose row is on the word.
    """
    words: dict[str, list[list[float]]] = defaultdict(list)
    for first in range(0, tables.n_latents, READ_AT_ONCE):
        on_progress("counting words", first, tables.n_latents)
        for row in tables.ask(BY_WORD, first, first + READ_AT_ONCE - 1):
            words[row["word"]].append([row["latent"], row["at_peak"], row["at_all"]])
        for found in words.values():
            if len(found) > FOUND:
                found.sort(key=lambda f: (-f[1], -f[2], f[0]))
                del found[FOUND:]
    for found in words.values():
        found.sort(key=lambda f: (-f[1], -f[2], f[0]))
    return words


def _write_shares(data: Path, name: str, entries: dict[str, Any]) -> None:
    shares: list[dict[str, Any]] = [{} for _ in range(SHARES)]
    for key, value in entries.items():
        shares[share_of(key)][key] = value
    for number, share in enumerate(shares):
        _write(data, f"{name}/{number:02x}", share)


def share_of(key: str) -> int:
    """Return the file number of a token or word: FNV-1a of its UTF-8, the same as in site.js."""
    state = 0x811C9DC5
    for byte in key.encode():
        state = ((state ^ byte) * 0x01000193) & 0xFFFFFFFF
    return state % SHARES


def _write(data: Path, name: str, value: Any) -> None:
    """Write a script that passes JSON to the page; it is ASCII, so that any charset reads it."""
    path = data / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    path.write_text(f"SAE.chunk({json.dumps(name)},{text});\n")
