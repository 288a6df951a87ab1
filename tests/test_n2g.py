"""N2G of known latents that are functions of tokens; interruption; independence of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.evaluate.programs import n2g
from sae_harvest.pipelines.evaluate.programs.finding import (
    Found,
    FoundPrograms,
    find_programs,
    sample,
)
from sae_harvest.pipelines.evaluate.programs.firings import SplitFirings
from sae_harvest.pipelines.evaluate.programs.forms import ANY
from sae_harvest.pipelines.evaluate.programs.n2g import Input, Program
from sae_harvest.pipelines.evaluate.programs.sampled import score
from sae_harvest.pipelines.evaluate.programs.scores import Means
from sae_harvest.pipelines.evaluate.programs.suffixes import START, TokenRows
from tests.program_cases import LENGTH, A, B, firings_of, made_rows, slow_scores

PAD = 99


def before(tokens: Sequence[int], back: int) -> int:
    return tokens[-1 - back] if len(tokens) > back else START


# latent → its activation on the last of some tokens, and its trie
LATENTS: list[tuple[Callable[[Sequence[int]], float], dict[tuple[int, ...], float]]] = [
    (lambda t: 3.0 * (t[-1] == A), {(A,): 3.0}),
    (lambda t: 2.5 * (t[-1] == B and before(t, 1) == A), {(A, B): 2.5}),
    (lambda t: 7.5 * (t[-1] == B and before(t, 2) == A), {(A, ANY, B): 7.5}),
    (lambda t: 4.0 * (t[-1] == B and before(t, 1) == START), {(START, B): 4.0}),
    # a weaker firing is a pattern of its own, and the longer pattern decides
    (
        lambda t: 5.0 * (t[-1] == B) * (1 if before(t, 1) == A else 0.4),
        {(A, B): 5.0, (B,): 2.0},
    ),
]


def fake(inputs: Sequence[Input]) -> np.ndarray:
    return np.array([LATENTS[latent][0](tokens) for latent, tokens in inputs])


def activations(rows: TokenRows, latent: int) -> np.ndarray:
    """The latent on every row, from the tokens of its context so far."""
    found = np.zeros(len(rows.token))
    for row in range(len(found)):
        start = row - row % LENGTH
        found[row] = LATENTS[latent][0](rows.token[start : row + 1].tolist())
    return found


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    return made_rows()


@pytest.fixture(scope="module")
def dense(rows: TokenRows) -> np.ndarray:
    return np.stack([activations(rows, latent) for latent in range(len(LATENTS))])


def firings(rows: TokenRows, dense: np.ndarray, latent: int) -> tuple[SplitFirings, SplitFirings]:
    return firings_of(dense[latent], rows.train), firings_of(dense[latent], rows.test)


def found_programs(rows: TokenRows, dense: np.ndarray, ask=fake) -> dict[int, Program]:
    examples = [
        example
        for latent in range(len(dense))
        for example in n2g.examples_of(rows, latent, firings(rows, dense, latent)[0], seed=0)
    ]
    return n2g.find(examples, ask, PAD)


def test_known_latents_give_exact_tries_and_perfect_scores(
    rows: TokenRows, dense: np.ndarray
) -> None:
    programs = found_programs(rows, dense)
    for latent, program in programs.items():
        found = dict(zip(program.patterns, program.predictions, strict=True))
        assert found == LATENTS[latent][1]
    means = Means()
    scored = score(rows, [*programs.items()], lambda n: firings(rows, dense, n), means)
    assert scored.scores.values == pytest.approx(np.ones((len(LATENTS), 6)), abs=1e-9)
    assert means.program.latents == len(LATENTS)
    texts = scored.texts({A: "A", B: "B"}.__getitem__)
    assert texts == ['"A" → 3', '"A" "B" → 2.5', '"A" * "B" → 7.5', '^ "B" → 4',
                     '"B" → 2; "A" "B" → 5']  # fmt: skip


def unless_after_a(inputs: Sequence[Input]) -> np.ndarray:
    return np.array([1.5 * (t[-1] == B and before(t, 1) != A) for _, t in inputs])


def test_fires_on_b_unless_after_a_needs_an_exception(rows: TokenRows) -> None:
    case = 1.5 * (rows.token == B) * (rows.before(1) != A)
    train, test = firings_of(case, rows.train), firings_of(case, rows.test)
    plain = n2g.find(n2g.examples_of(rows, 0, train, 0), unless_after_a, PAD)
    assert plain[0] == Program(((B,),), (1.5,))
    scores = score(rows, [*plain.items()], lambda n: (train, test), Means()).scores
    x = 1.5 * (rows.token == B)[rows.test]
    expected, recall = slow_scores(x, case[rows.test], 1.5)
    assert scores.values[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.recall[0].tolist() == recall
    assert (expected[0] < 0.95, expected[1]) == (True, 1)  # precision, recall

    wrong = n2g.counterexamples_of(rows, 0, train, plain[0], seed=0)
    assert len(wrong) == n2g.COUNTEREXAMPLES
    exact = n2g.with_exceptions(plain, wrong, unless_after_a, PAD)
    assert exact[0] == Program(((A, B), (B,)), (0.0, 1.5))
    scored = score(rows, [*exact.items()], lambda n: (train, test), Means())
    assert scored.scores.values[0].tolist() == pytest.approx([1] * 6, abs=1e-9)
    assert scored.texts({A: "A", B: "B"}.__getitem__) == ['"B" → 1.5; "A" "B" → 0']


def test_an_exception_may_be_far_from_the_row_or_at_the_start_of_a_context() -> None:
    one = n2g.Counterexample(0, (5, A, 6, 7, B), (B,), 1.5)

    def far(inputs: Sequence[Input]) -> np.ndarray:
        return np.array([1.5 * (t[-1] == B and before(t, 3) != A) for _, t in inputs])

    plain = {0: Program(((B,),), (1.5,))}
    found = n2g.with_exceptions(plain, [one], far, PAD)[0]
    assert found.patterns == ((A, ANY, ANY, B), (B,))

    def first(inputs: Sequence[Input]) -> np.ndarray:
        return np.array([1.5 * (t[-1] == B and len(t) != 2) for _, t in inputs])

    found = n2g.with_exceptions(plain, [one], first, PAD)[0]
    assert found.patterns[0][0] == START
    # nothing that it asks explains why the latent does not fire
    none = n2g.with_exceptions(plain, [one], lambda some: np.zeros(len(some)), PAD)[0]
    assert none == plain[0]


def test_patterns_that_cannot_grow_have_no_counterexamples(rows: TokenRows) -> None:
    nothing = firings_of(np.zeros(len(rows.token)), rows.train)
    long = tuple(rows.token[2:12].tolist())  # in the first context, which is held out
    for pattern in (long, tuple(rows.token[LENGTH + 2 : LENGTH + 12].tolist()), (START, B)):
        assert n2g.match(rows, [pattern]).max() == 0
        program = Program((pattern,), (2.0,))
        assert n2g.counterexamples_of(rows, 0, nothing, program, seed=0) == []
    program = Program((long[-3:],), (2.0,))
    wrong = n2g.counterexamples_of(rows, 0, nothing, program, seed=0)
    assert {one.tokens[-3:] for one in wrong} <= {long[-3:]}


def test_programs_do_not_depend_on_what_is_asked_together(
    rows: TokenRows, dense: np.ndarray
) -> None:
    asked: list[int] = []

    def one_at_a_time(inputs: Sequence[Input]) -> np.ndarray:
        asked.append(len(inputs))
        return np.concatenate([fake([one]) for one in inputs])

    together = found_programs(rows, dense, one_at_a_time)
    assert max(asked) > 32  # several latents and examples in a call
    for latent in range(len(dense)):
        examples = n2g.examples_of(rows, latent, firings(rows, dense, latent)[0], seed=0)
        assert n2g.find(examples, fake, PAD)[latent] == together[latent]


def test_examples_are_the_strongest_of_each_context_and_a_seeded_draw(
    rows: TokenRows, dense: np.ndarray
) -> None:
    train = firings(rows, dense, 4)[0]
    examples = n2g.examples_of(rows, 4, train, seed=0)
    assert len(examples) == n2g.TOP + n2g.RANDOM
    assert examples == n2g.examples_of(rows, 4, train, seed=0)
    assert examples[: n2g.TOP] == n2g.examples_of(rows, 4, train, seed=1)[: n2g.TOP]
    assert examples != n2g.examples_of(rows, 4, train, seed=1)
    assert [e.activation for e in examples[: n2g.TOP]] == [5.0] * n2g.TOP
    with_bos = TokenRows(
        rows.token, rows.train, rows.test, rows.cluster, rows.context_length, text_begins=1
    )
    for example in n2g.examples_of(with_bos, 4, train, seed=0):
        assert len(example.tokens) <= LENGTH - 1


def test_no_pattern_comes_of_an_example_whose_suffixes_do_not_suffice() -> None:
    example = n2g.Example(0, (A, B), 2.0)
    assert n2g.find([example], lambda inputs: np.zeros(len(inputs)), PAD) == {0: Program((), ())}


def test_the_pattern_with_most_tokens_decides(rows: TokenRows) -> None:
    patterns = ((A, B), (A, ANY, B), (START, B), (ANY,))
    found = n2g.match(rows, patterns)
    last = rows.token == B
    expected = np.full(len(rows.token), 3)
    expected[last & (rows.before(1) == START)] = 2
    expected[last & (rows.before(2) == A)] = 1
    expected[last & (rows.before(1) == A)] = 0
    assert found.tolist() == expected.tolist()
    ordered = n2g._program([((B,), 9.0), ((A, B), 1.0), ((A, ANY, B), 2.0), ((A, B), 3.0)])
    assert ordered == Program(((A, ANY, B), (A, B), (B,)), (2.0, 2.0, 9.0))


def test_after_a_bos_the_text_begins_at_the_second_token(rows: TokenRows) -> None:
    with_bos = TokenRows(
        rows.token, rows.train, rows.test, rows.cluster, rows.context_length, text_begins=1
    )
    found = n2g.match(with_bos, [(START, B)]) >= 0
    at = np.arange(len(rows.token)) % LENGTH
    assert found.tolist() == ((rows.token == B) & (at == 1)).tolist()
    found = n2g.match(with_bos, [(A, B)]) >= 0
    expected = (rows.token == B) & (rows.before(1) == A) & (at > 1)
    assert found.tolist() == expected.tolist()


def test_an_interrupted_search_goes_on_with_the_latents_that_are_left(
    rows: TokenRows, dense: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_harvest.pipelines.evaluate.programs.finding.LATENTS_AT_ONCE", 2)
    seen: list[int] = []
    killed_at = 3

    def ask(inputs: Sequence[Input]) -> np.ndarray:
        seen.extend(latent for latent, _ in inputs)
        if killed_at in seen:
            raise KeyboardInterrupt
        return fake(inputs)

    def search(kept: FoundPrograms) -> dict[int, Found]:
        return find_programs(
            rows, range(len(dense)), lambda n: firings(rows, dense, n), lambda: (ask, PAD), kept
        )

    with pytest.raises(KeyboardInterrupt):
        search(FoundPrograms(tmp_path / "kept", {"sae": "a"}))
    finished = {int(path.stem) for path in (tmp_path / "kept").glob("0*.json")}
    assert finished == {0, 1}
    seen.clear()
    killed_at = -1
    found = search(FoundPrograms(tmp_path / "kept", {"sae": "a"}))
    assert set(seen) == {2, 3, 4}
    assert {latent: plain for latent, (plain, _) in found.items()} == found_programs(rows, dense)
    seen.clear()
    assert search(FoundPrograms(tmp_path / "kept", {"sae": "a"})) == found
    assert seen == []
    search(FoundPrograms(tmp_path / "kept", {"sae": "another"}))
    assert set(seen) == {0, 1, 2, 3, 4}
    (tmp_path / "kept" / "000000003.json").write_text('{"program": {"patterns": 1}}')
    with pytest.raises(RunError, match=r"000000003\.json is damaged; remove it"):
        search(FoundPrograms(tmp_path / "kept", {"sae": "another"}))


def test_a_larger_sample_contains_a_smaller_one() -> None:
    alive = np.arange(3, 300, 3)
    small, large = sample(alive, 5, 0), sample(alive, 50, 0)
    assert set(small) < set(large) < set(alive)
    assert sample(alive, 1000, 0).tolist() == alive.tolist()
    assert (np.diff(large) > 0).all()
