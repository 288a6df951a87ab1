"""A local model reads exactly, and answers each request as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.explain.client.batches import batches
from sae_harvest.pipelines.explain.client.continuing import CLOSE, Continuing
from sae_harvest.pipelines.explain.client.estimate import Prices, estimate
from sae_harvest.pipelines.explain.client.interface import (
    Failure,
    Generation,
    Message,
    Read,
    Reading,
    Text,
)
from sae_harvest.pipelines.explain.client.local import LocalClient
from tests.families import FAMILIES
from tests.small_models import byte_tokenizer

CHOICES = ("0", "1", "2", "3")
WORDS = ["the cat", "a senator", "our team", "the red house", "東京 café", "law"]


def reading(prefix: str, words: list[str], choices: tuple[str, ...] = CHOICES) -> Reading:
    """Each word, a tab, a place and a digit, as in a simulation."""
    text, slots = "", []
    for word in words:
        text += f"{word}\t"
        slots.append(len(text))
        text += f"{len(word) % 4}\n"
    return Reading(prefix, text, tuple(slots), choices)


READINGS = [reading("the bank crossed the bridge:\n", WORDS[n : n + 2]) for n in range(5)]


def conversations(temperature: float) -> list[Generation]:
    return [
        Generation((Message("user", " ".join(WORDS[:n])),), 3 + n, temperature, seed=n)
        for n in range(1, 6)
    ]


@pytest.fixture(scope="module")
def client(model_folder: Path) -> LocalClient:
    return LocalClient(str(model_folder), "cpu")


def plainly(folder: Path, request: Reading) -> np.ndarray:
    """Probabilities by one pass over the whole text, as transformers computes it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = request.prefix + request.text
    encoded = tokenizer(text, return_offsets_mapping=True)
    begins = [begin for begin, _ in encoded["offset_mapping"]] + [len(text)]
    places = [begins.index(len(request.prefix) + slot) - 1 for slot in request.slots]
    with torch.no_grad():
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0, places]
    tokens = [tokenizer.encode(choice)[0] for choice in request.choices]
    return torch.softmax(logits[:, tokens].double(), -1).numpy()


def probabilities(answers: list[Read | Failure]) -> list[np.ndarray]:
    assert all(isinstance(answer, Read) for answer in answers), answers
    return [answer.probability for answer in answers if isinstance(answer, Read)]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_batch_and_no_shared_prefix_changes_an_answer(name: str, tmp_path: Path) -> None:
    config = FAMILIES[name].config()
    config.vocab_size = len(byte_tokenizer())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    requests = [reading("the thing:\n", [word, "law"]) for word in ("cat", "senator", "", "th")]
    client = LocalClient(str(tmp_path), "cpu")
    found = probabilities(client.read(requests))
    for request, probability in zip(requests, found, strict=True):
        np.testing.assert_allclose(probability, plainly(tmp_path, request), rtol=0, atol=1e-5)
        np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-12)
    asked = [Generation((Message("user", word),), 9) for word in ("a", "bc", "cat", "to")]
    assert client.generate(asked) == [client.generate([request])[0] for request in asked]


def test_readings_do_not_depend_on_batches_or_order(
    client: LocalClient, model_folder: Path
) -> None:
    wanted = [plainly(model_folder, request) for request in READINGS]
    alone = [client.read([request])[0] for request in READINGS]
    small = LocalClient(str(model_folder), "cpu", batch_tokens=1).read(READINGS)
    turned = client.read(READINGS[::-1])[::-1]
    for answers in (client.read(READINGS), alone, small, turned):
        for probability, exact in zip(probabilities(answers), wanted, strict=True):
            np.testing.assert_allclose(probability, exact, rtol=0, atol=1e-6)


def test_readings_with_other_prefixes_and_choices_may_be_mixed(
    client: LocalClient, model_folder: Path
) -> None:
    other = reading("a new law ", ["goals"], ("x", "y"))
    end = replace(other, slots=(*other.slots, len(other.text)))
    requests = [READINGS[0], other, READINGS[1], end, READINGS[2]]
    for probability, request in zip(probabilities(client.read(requests)), requests, strict=True):
        np.testing.assert_allclose(probability, plainly(model_folder, request), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_do_not_depend_on_batches_or_order(
    client: LocalClient, model_folder: Path, temperature: float
) -> None:
    requests = conversations(temperature)
    together = client.generate(requests)
    assert together == [client.generate([request])[0] for request in requests]
    assert together == client.generate(requests[::-1])[::-1]
    assert together == LocalClient(str(model_folder), "cpu", batch_tokens=40).generate(requests)
    assert all(isinstance(text, Text) and text.usage.new_tokens > 0 for text in together)


def test_greedy_text_is_that_of_transformers(client: LocalClient, model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    requests = conversations(0)
    for request, answer in zip(requests, client.generate(requests), strict=True):
        given = tokenizer(f"User: {request.messages[0].text}\n\nAssistant:", return_tensors="pt")
        ids = model.generate(**given, max_new_tokens=request.max_tokens, do_sample=False)[0]
        new = tokenizer.decode(ids[given["input_ids"].shape[1] :], skip_special_tokens=True)
        assert isinstance(answer, Text)
        assert answer.text == new.strip()


def test_a_close_choice_is_made_by_the_text_alone(
    client: LocalClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = client.generate(conversations(1))
    monkeypatch.setitem(CLOSE, torch.float32, float("inf"))  # every choice is close
    assert client.generate(conversations(1)) == wanted


def test_draws_follow_the_softmax(client: LocalClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLOSE, torch.float32, -1.0)  # no choice is close
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0])
    continuing: Any = Continuing(client._model, set())
    draws = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0):
        request = Generation((), 1, temperature)
        drawn = [continuing._chosen(logits, request, draws, [0]) for _ in range(4000)]
        found = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
        wanted = torch.softmax(logits / temperature, 0)
        assert (found - wanted).abs().max() < 0.03  # four standard errors


def test_other_seeds_give_other_texts(client: LocalClient) -> None:
    first = conversations(1.0)
    others = [replace(request, seed=request.seed + 100) for request in first]
    assert client.generate(first) != client.generate(others)


def test_a_place_inside_a_token_is_a_failure_among_answers(
    client: LocalClient, model_folder: Path
) -> None:
    inside = Reading(READINGS[0].prefix, "the cat", (1,), CHOICES)
    first = Reading("", "the cat", (0,), CHOICES)
    before, after = client.tally.failures.copy(), Reading("", "x", (1,), CHOICES)
    answers = client.read([READINGS[0], inside, READINGS[1], first, after])
    failure = Failure("no token limit at the place")
    assert [answers[1], answers[3]] == [failure, failure]
    assert client.tally.failures - before == {failure.reason: 2}
    for answer, request in zip(answers[::2], [READINGS[0], READINGS[1], after], strict=True):
        assert isinstance(answer, Read)
        np.testing.assert_allclose(
            answer.probability, plainly(model_folder, request), rtol=0, atol=1e-6
        )


def test_a_text_beyond_the_models_context_is_a_failure(model_folder: Path) -> None:
    client = LocalClient(str(model_folder), "cpu")
    long = Reading("", "x" * 100, (100,), CHOICES)
    n = client.n_tokens(long)
    told = Failure(f"too long: {n} tokens, the model reads 64")
    assert client.read([READINGS[0], long])[1] == told
    short, longer = Generation((Message("user", "a"),), 4), Generation((Message("user", "a"),), 64)
    answers = client.generate([longer, short])
    assert isinstance(answers[1], Text)
    assert answers[0] == Failure(
        f"too long: {client.n_tokens(short) + 64} tokens, the model reads 64"
    )
    assert client.tally.failures == {"too long": 2}
    assert client.tally.asked == 2


def test_choices_with_the_same_first_token_are_refused(client: LocalClient) -> None:
    with pytest.raises(InputError, match=r"two of the choices '0', '0x' begin with the same tok"):
        client.read([Reading("", "the cat\t", (8,), ("0", "0x"))])


def test_each_answer_is_told_once(client: LocalClient) -> None:
    told: list[tuple[int, Any]] = []
    answers = client.read(READINGS, lambda number, answer: told.append((number, answer)))
    assert [answer for _, answer in sorted(told, key=lambda one: one[0])] == answers


def test_the_identity_names_model_weights_and_dtype(
    client: LocalClient, model_folder: Path
) -> None:
    name, weights, dtype = client.identity.split(" ")
    assert (name, dtype) == (str(model_folder), "float32")
    assert weights.startswith("xxh3:")


def test_a_chat_template_is_used_also_without_place_for_a_system_message(
    model_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    client = LocalClient(str(model_folder), "cpu")
    client._tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    )
    turns = (Message("system", "s"), Message("user", "u"))
    assert client._prompt(Generation(turns, 1)) == tokenizer.encode("<user>s\n\nu<answer>")
    assert client._prompt(Generation(turns[1:], 1)) == tokenizer.encode("<user>u<answer>")


def test_batches_hold_every_text_once_within_their_size() -> None:
    lengths = [5, 1, 9, 5, 2, 30, 1]
    found = list(batches(lengths, 10))
    assert sorted(number for some in found for number in some) == list(range(7))
    assert all(len(some) * max(lengths[n] for n in some) <= 10 for some in found if len(some) > 1)
    for some in batches(lengths, 100, padded=False):
        assert len({lengths[number] for number in some}) == 1


def test_an_estimate_counts_what_the_model_would_read(client: LocalClient) -> None:
    requests = [*READINGS, *conversations(0)]
    found = estimate(requests, client.n_tokens)
    before = client.tally.prompt_tokens
    client.read(READINGS)
    client.generate(conversations(0))
    assert found.prompt_tokens == client.tally.prompt_tokens - before
    assert (found.readings, found.generations, found.exact) == (5, 5, True)
    assert found.new_tokens == 5 + sum(range(4, 9))
    rough = estimate([Reading("abc", "de", (), CHOICES)]) + estimate(conversations(0)[:1])
    assert (rough.prompt_tokens, rough.exact) == (2 + 2, False)
    assert "4 characters to a token" in str(rough)
    assert "10 tokens to read (by the tokenizer)" in str(replace(found, prompt_tokens=10))
    assert replace(found, prompt_tokens=10, new_tokens=4).cost(Prices(2.0, 5.0)) == 40 / 1e6
