"""The label of each latent: what describes it best, prose or program, in `labels.parquet`.

- Where an explanation was scored, its correlation on the test excerpts with firings drawn from all
  is compared with those of the latent's programs on the same tokens; the larger one wins.
- Without a scored explanation, an explanation that somebody has put into the table is the label.
- Otherwise the program with the largest correlation on all held-out rows is; without programs, the
  tokens on which the latent fires most often.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.features.reading.query import connect, first_line
from sae_harvest.pipelines.features.tables.folder import EXPLANATIONS, LABELS, PROGRAMS, SCORES
from sae_harvest.pipelines.features.tables.writers import TableWriter

# The score that labels are compared by: its task and its part in the table of scores.
SIMULATION, ALL_FIRINGS = "simulation", "all firings"
SHOWN_TOKENS, SHOWN_PATTERNS = 4, 3
PROSE, TOP_TOKENS = "explanation", "top tokens"
SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("label", pa.string()),
        ("kind", pa.string()),
        ("score", pa.float32()),
        ("low", pa.float32()),
        ("high", pa.float32()),
    ]
)
TOKENS = f"""
    SELECT latent, 0 AS place, '{TOP_TOKENS}' AS kind, NULL::FLOAT AS score, NULL::FLOAT AS low,
        NULL::FLOAT AS high,
        CASE WHEN dead THEN 'dead' ELSE array_to_string(list_transform(
            top_tokens[1:{SHOWN_TOKENS}], lambda t: '"' || t || '"'), ', ') END AS label
    FROM latents
"""
BY_PROGRAMS = f"""
    SELECT latent, 1 AS place, kind, pearson AS score, pearson_low AS low, pearson_high AS high,
        array_to_string(string_split(program, '; ')[1:{SHOWN_PATTERNS}], '; ') AS label
    FROM programs WHERE pearson > 0
    QUALIFY row_number() OVER (PARTITION BY latent ORDER BY pearson DESC, kind) = 1
"""
UNSCORED = f"""
    SELECT latent, 2 AS place, '{PROSE}' AS kind, NULL::FLOAT AS score, NULL::FLOAT AS low,
        NULL::FLOAT AS high, min(explanation) AS label
    FROM explanations WHERE explanation IS NOT NULL {{chosen}} GROUP BY latent
"""
SCORED = f"""
    SELECT scores.latent AS latent, 3 AS place, subject AS kind, value AS score, low, high,
        CASE WHEN subject = '{PROSE}' THEN explanations.explanation ELSE
            array_to_string(string_split(program, '; ')[1:{SHOWN_PATTERNS}], '; ') END AS label
    FROM scores
    LEFT JOIN explanations ON explanations.id = scores.id AND explanations.chosen
    LEFT JOIN {{programs}} AS p ON p.latent = scores.latent AND p.kind = subject
    WHERE task = '{SIMULATION}' AND part = '{ALL_FIRINGS}' AND metric = 'pearson'
        AND label IS NOT NULL AND value IS NOT NULL
    QUALIFY row_number() OVER (
        PARTITION BY scores.latent ORDER BY value DESC, subject = '{PROSE}', subject) = 1
"""
NO_PROGRAMS = "(SELECT NULL::INTEGER AS latent, NULL AS kind, NULL AS program)"


def write_labels(features: Path) -> None:
    """Write `labels.parquet` from what the folder of tables holds now.

    Raises:
        RunError: a table is damaged, or the file cannot be written.
    """
    has = {name: (features / f"{name}.parquet").is_file() for name in (EXPLANATIONS, PROGRAMS)}
    scored = (features / f"{SCORES}.parquet").is_file() and has[EXPLANATIONS]
    connection = connect(features)
    try:
        parts = [TOKENS]
        if has[PROGRAMS]:
            parts.append(BY_PROGRAMS)
        if has[EXPLANATIONS]:
            columns = {row[0] for row in connection.sql("DESCRIBE explanations").fetchall()}
            parts.append(UNSCORED.format(chosen="AND chosen" if "chosen" in columns else ""))
        if scored:
            parts.append(SCORED.format(programs=PROGRAMS if has[PROGRAMS] else NO_PROGRAMS))
        every = " UNION ALL BY NAME ".join(f"({part})" for part in parts)
        table = connection.sql(
            f"SELECT latent, label, kind, score, low, high FROM ({every}) "
            "QUALIFY row_number() OVER (PARTITION BY latent ORDER BY place DESC) = 1 "
            "ORDER BY latent"
        ).to_arrow_table()
    except duckdb.Error as error:
        raise RunError(
            f"{features} cannot be read ({first_line(error)}); build the tables again."
        ) from error
    finally:
        connection.close()
    with TableWriter(features / f"{LABELS}.parquet") as writer:
        writer.add(table.cast(SCHEMA))
