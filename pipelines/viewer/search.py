"""Search for latents by number, by token, by text in contexts, by explanation."""

from __future__ import annotations

from typing import Any

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.features.tables.checks import check_context
from sae_harvest.pipelines.viewer.latent import compact, name_of
from sae_harvest.pipelines.viewer.tables import Tables

LONGEST = 200  # characters of a search
FOUND = 30  # latents listed per kind of search

# Specificity: the share of the latent's firings that are on the token, reduced if few firings were
# counted, times the ratio of its mean activation on the token to its mean activation. Lift: how
# many times more often it fires on the token than on a row in general. No table counts a token's
# rows; the count of the latent that fires most often on the token stands for them.
SPECIFIC = """
    WITH matched AS (SELECT {key} AS key, * FROM tokens {condition}),
    rows_read AS (SELECT max(n_fire / density) AS n FROM summary WHERE density > 0),
    base AS (
        SELECT key, sum(most) / any_value(n) AS share_of_rows
        FROM (SELECT key, token, max(count) AS most FROM matched GROUP BY key, token), rows_read
        GROUP BY key
    ), single AS (
        SELECT key, latent, list(text ORDER BY count DESC, token) AS texts,
            sum(count)::BIGINT AS count, sum(count * mean) / sum(count) AS mean,
            sum(share) AS share
        FROM matched GROUP BY key, latent
    ), scored AS (
        SELECT key, latent, texts, count, single.mean AS mean, share, share / share_of_rows AS lift,
            (1 - 1 / sqrt(count)) * share * single.mean / summary.mean AS specificity
        FROM single JOIN base USING (key) JOIN summary USING (latent)
    )
    SELECT key, latent, texts, count, mean, share, lift FROM scored
    QUALIFY row_number() OVER (
        PARTITION BY key ORDER BY specificity DESC, count DESC, latent) <= {found}
    ORDER BY key, specificity DESC, count DESC, latent
"""
# The token of the context's row, and whether the searched text overlaps it.
PEAK = """
    WITH found AS (
        SELECT *, position - window_start AS place, length($q) - 1 AS around,
            coalesce(token_ends[position - window_start], 0) AS before,
            token_ends[position - window_start + 1] - before AS long
        FROM contexts WHERE activation > 0 AND contains(lower(text), $q) {only}
    ), marked AS (
        SELECT *, contains(lower(substr(text, greatest(before - around, 0) + 1,
            least(before, around) + long + around)), $q) AS on_peak
        FROM found
    )
"""
TEXT_LATENTS = (
    PEAK
    + """
    SELECT latent, count(*) AS n, count(*) FILTER (on_peak) AS n_peak
    FROM marked JOIN (SELECT latent, max FROM summary) USING (latent)
    GROUP BY latent
    ORDER BY coalesce(sum(activation / max) FILTER (on_peak), 0) DESC, sum(activation / max) DESC,
        latent
    LIMIT $limit
"""
)
TEXT_CONTEXTS = (
    PEAK
    + """
    SELECT latent, on_peak, stratum, rank, activation, row, document, position, place, text,
        token_ends, activations
    FROM marked QUALIFY row_number() OVER (
        PARTITION BY latent ORDER BY on_peak DESC, activation DESC, stratum, rank) = 1
"""
)


def search(tables: Tables, question: str) -> dict[str, Any]:
    """Return the results by kind; `latent` is None unless the search is a latent's number.

    Raises:
        InputError: the search is empty or too long.
    """
    question = check_question(question)
    number = question.removeprefix("#")
    latent = int(number) if number.isdecimal() and int(number) < tables.n_latents else None
    return {
        "question": question,
        "latent": latent,
        "tokens": by_token(tables, question),
        "texts": by_text(tables, question),
        "explanations": by_explanation(tables, question) if tables.has_explanations else None,
    }


def check_question(question: str) -> str:
    """Return the search without blanks around it; `InputError` if it is empty or too long."""
    question = question.strip()
    if not question:
        raise InputError("Type a token, a piece of text or a latent's number to search for.")
    if len(question) > LONGEST:
        raise InputError(f"Search for at most {LONGEST} characters, not {len(question)}.")
    return question


def by_token(tables: Tables, question: str) -> dict[str, Any]:
    """Return latents that fire on a token of this text, the most specific first.

    Blanks and case do not matter. If no token equals the text, tokens that begin with it are taken.
    `texts` lists the matching tokens of one latent; count, share, lift and mean cover all of them.
    """
    lowered = question.lower()
    for match in ("lower(trim(text)) = ?", "starts_with(lower(trim(text)), ?)"):
        sql = SPECIFIC.format(key="0", condition=f"WHERE {match}", found=FOUND)
        rows = tables.ask(sql, lowered)
        if rows:
            break
    labels = tables.labels([row["latent"] for row in rows])
    for row in rows:
        del row["key"]
        row |= name_of(labels, row["latent"])
    return {"exact": match.startswith("lower"), "rows": rows}


def by_text(tables: Tables, question: str) -> list[dict[str, Any]]:
    """Return latents whose contexts contain the text.

    They are sorted by the sum of their activations on the text, then by the sum in all contexts
    with the text. Each activation counts as a share of the latent's maximum.
    """
    lowered = question.lower()
    found = tables.ask_named(TEXT_LATENTS.format(only=""), {"q": lowered, "limit": FOUND})
    if not found:
        return []
    chosen = [row["latent"] for row in found]
    only = f"AND latent IN ({', '.join(map(str, chosen))})"  # safe in SQL: whole numbers
    best = {
        row["latent"]: row
        for row in tables.ask_named(TEXT_CONTEXTS.format(only=only), {"q": lowered})
    }
    for row in best.values():
        check_context(
            tables.features, row["latent"], row["stratum"], row["place"], row["text"],
            row["token_ends"], row["activations"],
        )  # fmt: skip
    labels = tables.labels(chosen)
    if unknown := set(chosen) - (labels.keys() & best.keys()):
        raise RunError(
            f"{tables.features / 'contexts.parquet'} is damaged (it has contexts of the latent "
            f"{unknown.pop()}); build the tables again."
        )
    documents = tables.titles([row["document"] for row in best.values()])
    return [
        row
        | {
            "context": compact(best[row["latent"]]),
            "max": labels[row["latent"]]["max"],
            **name_of(labels, row["latent"]),
            "title": documents.get(best[row["latent"]]["document"], {}).get("title"),
        }
        for row in found
    ]


def by_explanation(tables: Tables, question: str) -> list[dict[str, Any]]:
    """Return latents whose explanation contains every word of the search."""
    rows = tables.explained(question.lower().split(), FOUND)
    labels = tables.labels([row["latent"] for row in rows])
    return [row | name_of(labels, row["latent"]) for row in rows]
