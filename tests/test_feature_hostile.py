"""Tables and records from elsewhere, altered at random: an answer or one sentence, never more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_harvest.common.errors import SaeHarvestError
from sae_harvest.pipelines.features.commands.cli import main
from sae_harvest.pipelines.features.counting import kernels
from sae_harvest.pipelines.features.tables.checks import BINS
from sae_harvest.pipelines.features.tables.folder import STRATA, TABLES
from sae_harvest.pipelines.viewer import site
from sae_harvest.pipelines.viewer.latent import latent_page
from sae_harvest.pipelines.viewer.listing import Listing, list_latents
from sae_harvest.pipelines.viewer.overview import overview
from sae_harvest.pipelines.viewer.search import search
from sae_harvest.pipelines.viewer.site import write_site
from sae_harvest.pipelines.viewer.tables import Tables
from tests.feature_cases import refusal
from tests.made_tables import run_json, write_tables

N = 6
FORMATS = ("neuronpedia", "openai", "circuit-tracer", "delphi")
ALTERED = (*TABLES, "firings/000000", "explanations", "programs")


@pytest.fixture(scope="module", autouse=True)
def few_files() -> Iterator[None]:
    """A site of a few files, which are quicker to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "SHARES", 2)
        yield


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tables(tmp_path_factory.mktemp("hostile") / "features", N)
    texts = pa.table({"latent": pa.array([1, 2], pa.int32()), "explanation": ["court", "river"]})
    pq.write_table(texts, folder / "explanations.parquet")
    pq.write_table(made_programs(), folder / "programs.parquet")
    return folder


def made_programs() -> pa.Table:
    """Two programs of each latent but the first."""
    n = 2 * (N - 1)
    columns = {
        "latent": pa.array(np.repeat(np.arange(1, N), 2), pa.int32()),
        "kind": ["ngrams", "tokens"] * (N - 1),
        "program": ['" court" \u2192 2; ";" \u2192 1'] * n,
        "rows": pa.array([1000] * n, pa.int64()),
        "positives": pa.array([20] * n, pa.int64()),
    }
    for name in ("f1", "f1_low", "f1_high", "other_f1", "always_f1"):
        columns[name] = pa.array([0.5] * n, pa.float32())
    return pa.table(columns)


def test_constants_that_are_written_twice_agree() -> None:
    assert BINS == kernels.BINS
    assert len(STRATA) == len(set(STRATA)) == 14


def use_everything(features: Path, out: Path, queried: Sequence[str] = ALTERED) -> int:
    """Every command that reads tables; how many of them answered."""
    words = ["--features", str(features)]
    commands = [
        *(["show", str(latent), *words] for latent in range(N)),
        *(["query", f"SELECT * FROM {name.partition('/')[0]}", *words] for name in queried),
        *(["export", "--format", f, "--name", "x", "--out", str(out / f), *words] for f in FORMATS),
    ]
    answered = 0
    for command in commands:
        result = CliRunner().invoke(main, command)
        if result.exit_code == 0:
            answered += 1
            continue
        assert result.exit_code == 1, (command, result.output, result.exception)
        assert isinstance(result.exception, SystemExit), command
        assert result.stderr.strip().splitlines()[-1].startswith("Error: "), result.stderr
    try:
        tables = Tables(features)
        overview(tables)
        list_latents(tables, Listing(sort="max", fires_on="court"))
    except SaeHarvestError:
        return answered
    for latent in range(N):
        try:
            json.dumps(latent_page(tables, latent), allow_nan=False)
        except SaeHarvestError:
            continue
        answered += 1
    for last in (lambda: search(tables, "court"), lambda: write_site(features, None, out / "site")):
        try:
            json.dumps(last(), allow_nan=False, default=str)
        except SaeHarvestError:
            continue
        answered += 1
    return answered


def test_whole_tables_are_answered_by_everything_but_delphi(features: Path, tmp_path: Path) -> None:
    """delphi's cache needs the store."""
    assert use_everything(features, tmp_path) == 6 + len(ALTERED) + 3 + 6 + 2


NUMBERS = (-1, 0, 1, 7, 383, 384, 2**15, 2**31 - 1, 2**40, 2**62)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e-300, 1e38, 1e300)
WORDS = ("", "x", "\x1b[31m", "decile_11", "e\u0301" * 50, "a" * 5000)


def altered_value(draw: st.DrawFn, kind: pa.DataType) -> Any:
    """A value of a column that it should not have."""
    if draw(st.integers(0, 4)) == 0:
        return None
    if pa.types.is_list(kind):
        return [altered_value(draw, kind.value_type) for _ in range(draw(st.integers(0, 3)))]
    if pa.types.is_floating(kind):
        with np.errstate(over="ignore"):
            return float(np.array(draw(st.sampled_from(FLOATS))).astype(kind.to_pandas_dtype()))
    if pa.types.is_integer(kind):
        info = np.iinfo(kind.to_pandas_dtype())
        return min(draw(st.sampled_from(NUMBERS)), int(info.max))
    return draw(st.booleans()) if pa.types.is_boolean(kind) else draw(st.sampled_from(WORDS))


def altered(draw: st.DrawFn, table: pa.Table) -> pa.Table:
    column = draw(st.integers(0, table.num_columns - 1))
    name, values = table.column_names[column], table.column(column)
    way = draw(st.sampled_from(["value", "value", "value", "values", "drop", "type", "twice",
                                "rows", "order", "empty", "metadata"]))  # fmt: skip
    if way in ("value", "values"):
        new = values.to_pylist()
        for row in range(len(new)) if way == "values" else [draw(st.integers(0, len(new) - 1))]:
            new[row] = altered_value(draw, values.type) if row < 20 else None
        return table.set_column(column, name, pa.array(new, values.type))
    if way == "drop":
        return table.drop_columns([name])
    if way == "type":
        kind = draw(st.sampled_from([pa.string(), pa.int8(), pa.float64(), pa.list_(pa.int32()),
                                     pa.binary(), pa.struct([("x", pa.int32())])]))  # fmt: skip
        return table.set_column(column, name, pa.nulls(len(table), kind))
    if way == "twice":
        return table.append_column(name, values)
    if way == "rows":
        return pa.concat_tables([table, table.slice(0, 3)])
    if way == "order":
        return table.take(pa.array(range(len(table) - 1, -1, -1)))
    if way == "empty":
        return table.slice(0, 0)
    deep = b"[" * 50_000
    return table.replace_schema_metadata(dict.fromkeys((b"geo", b"pandas", b"x"), deep))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_altered_tables_end_in_an_answer_or_a_sentence(
    features: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("altered")
    folder = shutil.copytree(features, root / "features")
    names = data.draw(st.lists(st.sampled_from(ALTERED), min_size=1, max_size=2, unique=True))
    for name in names:
        path = folder / f"{name}.parquet"
        table = pq.read_table(path, partitioning=None)
        changed = data.draw(st.composite(altered)(table))
        pq.write_table(changed, path)
        if data.draw(st.integers(0, 3)) == 0:
            content = bytearray(path.read_bytes())
            for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
                content[at] ^= data.draw(st.integers(1, 255))
            path.write_bytes(content)
    use_everything(folder, root, names)
    assert {path.name for path in root.iterdir()} <= {"features", "site", *FORMATS}
    shutil.rmtree(root)


RECORDS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", "/etc", "../..", "a\x00b", "\udcff", "x" * 5000, "resid_post.1 ", "3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*json.loads(run_json(N)), "relative"]), RECORDS))
def test_an_altered_record_ends_in_an_answer_or_a_sentence(
    features: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    root = tmp_path_factory.mktemp("record")
    folder = root / "features"
    folder.mkdir()
    for path in features.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "run.json").unlink()
    record = json.loads((features / "run.json").read_text()) | changes
    (folder / "run.json").write_text(json.dumps(record))
    for command in (["show", "1"], *(["export", "--format", f, "--out", str(root / f)]
                                     for f in ("neuronpedia", "delphi"))):  # fmt: skip
        result = CliRunner().invoke(main, [*command, "--features", str(folder)])
        assert result.exit_code in (0, 1), (command, result.output)
        assert isinstance(result.exception, SystemExit | None), (command, result.exception)
    assert {path.name for path in root.iterdir()} <= {"features", *FORMATS}
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '{"tables": NaN}', "x" * 2**21, "\xff",
     '{"tables": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_a_record_that_is_no_json_is_one_sentence(
    features: Path, tmp_path: Path, text: str
) -> None:
    folder = shutil.copytree(features, tmp_path / "features")
    (folder / "run.json").write_bytes(text.encode("latin-1"))
    for command in ("show 1", "query FROM+latents", "export --format openai --out x",
                    "site --out x", "serve"):  # fmt: skip
        words = [word.replace("+", " ") for word in command.split()]
        assert "run.json is damaged" in refusal(*words, "--features", folder)
    build = ("build", "--store", tmp_path, "--sae", tmp_path, "--out", folder)
    refusal(*build)


def test_text_that_is_not_utf8_is_one_sentence(features: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(features, tmp_path / "features")
    table = pq.read_table(folder / "contexts.parquet")
    place = table.column_names.index("text")
    texts = [text.encode() for text in table["text"].to_pylist()]
    texts[0] = texts[0][:5] + b"\xff" + texts[0][6:]
    wrong = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(table.set_column(place, "text", wrong), folder / "contexts.parquet")
    given = ("--features", folder)
    assert "cannot be read" in refusal("show", 0, *given)
    export = ("export", "--format", "openai", "--out", tmp_path / "out")
    assert "contexts.parquet is damaged" in refusal(*export, *given)
    with pytest.raises(SaeHarvestError, match="cannot be read"):
        latent_page(Tables(folder), 0)


@pytest.mark.parametrize(
    ("column", "value"),
    [("mean_square", -1.0), ("mean_square", 1e-300), ("std", 1e300), ("kurtosis", 1e300),
     ("mean", -1.0), ("n_fire", 0)],
)  # fmt: skip
def test_moments_that_cannot_be_are_an_answer_or_a_sentence(
    features: Path, tmp_path: Path, column: str, value: float
) -> None:
    folder = shutil.copytree(features, tmp_path / "features")
    table = pq.read_table(folder / "latents.parquet")
    place = table.column_names.index(column)
    values = pa.array([value, *table[column].to_pylist()[1:]], table.schema.field(column).type)
    pq.write_table(table.set_column(place, column, values), folder / "latents.parquet")
    export = ("export", "--format", "openai", "--out", str(tmp_path / "out"))
    result = CliRunner().invoke(main, [*export, "--features", str(folder)])
    assert result.exit_code in (0, 1)
    assert isinstance(result.exception, SystemExit | None)
    assert (result.exit_code == 0) == (value == 1e-300)


def test_a_column_whose_name_is_not_utf8_is_one_sentence(features: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(features, tmp_path / "features")
    path = folder / "latents.parquet"
    path.write_bytes(path.read_bytes().replace(b"token_entropy_bits", b"token_entropy_bi\xe8s"))
    assert "latents.parquet is damaged" in refusal("show", 0, "--features", folder)


def test_damaged_pages_are_one_sentence(features: Path, tmp_path: Path) -> None:
    """Their checksums are found wrong, or what DuckDB decodes makes no sense."""
    folder = shutil.copytree(features, tmp_path / "features")
    for name in ("histograms", "neighbours"):
        path = folder / f"{name}.parquet"
        content = bytearray(path.read_bytes())
        content[4:40] = bytes(255 - byte for byte in content[4:40])  # the first page's header
        path.write_bytes(content)
    assert "cannot be read" in refusal("show", 0, "--features", folder)
    assert "cannot run" in refusal("query", "FROM histograms", "--features", folder)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\x00", "..", "", "\n", "x" * 300, "\\"])
def test_a_name_that_is_no_name_of_a_folder_is_refused(
    features: Path, tmp_path: Path, name: str
) -> None:
    given = ("--features", features, "--format", "openai", "--out", tmp_path / "out")
    assert "cannot be the name of a folder" in refusal("export", *given, "--name", name)
    assert list(tmp_path.iterdir()) == []
