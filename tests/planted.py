"""Latents with known rules over words, in a store of a small model, and a client that knows them.

The store is harvested for its tokens and documents; its only site is then written by the rules, one
dimension for each, so that the tables of the "neurons" are those of the planted latents.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.explain.client.interface import (
    Failure,
    Generation,
    Read,
    Reading,
    Tally,
    Text,
    Usage,
    unheard,
)
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.layout import Plan, SitePlan
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.seals import seal
from sae_harvest.store.writer import Shard, create_store, write_shard

SITE = "mlp_act.0"
NOUNS = ["dog", "house", "river", "bank", "bridge", "letter"]
VERBS = ["sees", "crossed", "repairs", "sold", "likes"]
GERMAN = ["hund", "haus", "fluss", "brücke", "sieht", "verkauft", "immer", "gern"]
YEARS = [str(year) for year in range(1950, 1970)]
NUMBERS = [str(n) for n in range(2, 40)]
WIDTH = 32  # neurons of the small model; those after the planted ones never fire
LEVEL = 5.0  # activation of a planted latent where its rule holds

Rule = Callable[[Sequence[str]], list[bool]]  # words of a text → whether the latent fires on each


def _inside_quotation(words: Sequence[str]) -> list[bool]:
    first = next((word for word in words if word in "«»"), "«")
    inside, found = first == "»", []
    for word in words:
        if word in "«»":
            inside = word == "«"
            found.append(False)
        else:
            found.append(inside)
    return found


RULES: dict[str, Rule] = {
    "numbers": lambda words: [word.isdigit() for word in words],
    "numbers, but not years": lambda words: [w.isdigit() and w not in YEARS for w in words],
    "the word after the": lambda words: [
        n > 0 and words[n - 1] == "the" for n in range(len(words))
    ],
    "German": lambda words: [word in GERMAN for word in words],
    "words of a quotation": _inside_quotation,
    "first word of a sentence": lambda words: [word[:1].isupper() for word in words],
    "bananas": lambda words: [word == "bananas" for word in words],  # no latent; a wrong rule
}
PLANTED = tuple(RULES)[:-1]


def sentence(rng: random.Random) -> str:
    """Return a sentence; on most of them only one latent fires, or none."""
    kind = rng.randrange(16)
    noun, verb, other = rng.choice(NOUNS), rng.choice(VERBS), rng.choice(NOUNS)
    words = ["some", noun, verb, "a", other, ";"]
    if kind == 0:
        words = [rng.choice(GERMAN) for _ in range(4)]
    elif kind == 1:
        words[0] = rng.choice(NUMBERS)
    elif kind in (2, 6):
        words[3:] = ["in", rng.choice(YEARS), ";"]
    elif kind == 3:
        words[3:] = ["«", "no", other, "»", ";"]
    elif kind == 4:
        words[3] = "the"
    elif kind == 5:
        words[0] = "Some"
    return " ".join(words)


def make_planted(root: Path) -> None:
    """Write root/store and root/features."""
    rng = random.Random(0)
    texts = [" ".join(sentence(rng) for _ in range(rng.randint(2, 4))) for _ in range(2500)]
    rows = [json.dumps({"text": f"{text} {number}x"}) for number, text in enumerate(texts)]
    (root / "texts.jsonl").write_text("\n".join(rows) + "\n")
    _make_model(root / "model", texts)
    config = HarvestConfig(
        model=str(root / "model"),
        corpus=CorpusSpec(name=str(root / "texts.jsonl")),
        sites=("resid_post.0",),
        tokens="all",
        context_length=256,
        shard_rows=8192,
        compute_dtype="float32",
    )
    run(config, root / "harvested", Execution(workers=0))
    store = ActivationStore.open(root / "harvested")
    tokens = TokenTexts(PreTrainedTokenizerFast.from_pretrained(root / "model"))
    objects = LocalObjects(root / "store")
    sites = [SitePlan(name=SITE, width=WIDTH).model_dump()]
    plan = Plan.model_validate(store.plan | {"sites": sites})
    create_store(objects, plan, {})
    for number in range(store.n_shards):
        commit_shard(objects, write_shard(objects, plan, _shard(store, tokens, number)))
    seal(objects, plan, store.n_shards)
    features = FeatureConfig(n_random=6, n_inactive=20, n_hard=20, window_tokens=32)
    build(str(root / "store"), "identity", root / "features", features)


def _make_model(folder: Path, texts: Sequence[str]) -> None:
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: n for n, word in enumerate(["<|endoftext|>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=256, n_embd=8, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


def _shard(store: ActivationStore, texts: TokenTexts, number: int) -> Shard:
    """Return a shard of the harvest with the planted site in the place of its own."""
    first, last = store.shard_span(number)
    contexts = first // store.context_length, last // store.context_length
    tokens = store.tokens(*contexts)
    document, _ = store.row_documents(number)
    x = np.zeros((last - first, WIDTH), np.float32)
    flat = tokens.reshape(-1)
    limits = np.flatnonzero(np.diff(document, prepend=-2, append=-2))
    for start, stop in pairwise(limits):
        words = [texts.one(int(token)).strip() for token in flat[start:stop]]
        for latent, name in enumerate(PLANTED):
            x[start:stop, latent] = LEVEL * np.array(RULES[name](words), np.float32)
    x[:, -1] = -LEVEL  # or every row with a firing would be an outlier row
    norms = np.linalg.norm(x, axis=1)
    return Shard(
        number, tokens, store.pieces(number), store.documents(number),
        {SITE: x.astype(np.float16)}, {SITE: norms}, {"context": contexts[0]},
    )  # fmt: skip


class Scripted:
    """A client that knows the rules: a perfect explainer and simulator, or one that errs."""

    def __init__(
        self,
        say: Callable[[str], str] = lambda right: right,
        revise: Callable[[str], str] = lambda right: right,
    ) -> None:
        """`say`, `revise`: return what the explainer says instead of the right explanation."""
        self.tally, self._say, self._revise = Tally(), say, revise
        self.asked: list[Generation | Reading] = []

    identity, reads = "scripted", True

    def generate(self, requests, on_answer=unheard) -> list[Text | Failure]:
        self.asked += requests
        return [Text(self._said(r.messages[-1].text), Usage(1, 1)) for r in requests]

    def _said(self, question: str) -> str:
        if "Write 5 short texts" in question:
            return PROPOSALS
        right = _best_rule(question)
        return self._revise(right) if "Say the phrase again" in question else self._say(right)

    def read(self, requests, on_answer=unheard) -> list[Read | Failure]:
        self.asked += requests
        return [self._read(request) for request in requests]

    def _read(self, request: Reading) -> Read:
        found = re.findall(r"(?:active on|Description): (.*)\n", request.prefix)
        rule = RULES.get(found[-1] if found else "", RULES["bananas"])
        if len(request.choices) == 10:
            words = [line.split("\t")[0].strip() for line in request.text.splitlines()]
            chosen = [9 * int(fires) for fires in rule(words)]
        elif len(request.choices) == 2:
            words, which = _marked(request.text.splitlines()[0].removeprefix("Text: "))
            fires = np.array(rule(words), bool)
            # marked words have to be what the rule says; without marks, one of all
            yes = (fires == which)[which].all() if which.any() else fires.any()
            chosen = [int(not yes)]
        else:
            chosen = [0]
        probability = np.zeros((len(chosen), len(request.choices)))
        probability[np.arange(len(chosen)), chosen] = 1
        return Read(probability, Usage(1, 0))


PROPOSALS = """Here they are:
+ 7 dog sees a bank ;
+ some river likes 12 ;
- some house sold in 1955 ;
- some bank crossed in 1961 ;
- some dog sees a house ;
"""


class PlantedReader:
    """Reads typed texts by the rules."""

    def activations_of(self, text: str, latent: int) -> tuple[list[str], np.ndarray]:
        words = text.split()
        fires = RULES[PLANTED[latent]](words)
        return [f" {word}" for word in words], LEVEL * np.array(fires, np.float32)


def _marked(text: str) -> tuple[list[str], np.ndarray]:
    """Split a text with marks into words, and which of them are marked."""
    words, which, inside = [], [], False
    for piece in re.split(r"(<<|>>)", text):
        if piece in ("<<", ">>"):
            inside = piece == "<<"
        else:
            some = piece.split()
            words += some
            which += [inside] * len(some)
    return words, np.array(which, bool)


def _best_rule(message: str) -> str:
    """Return the rule that fits the texts of a message best, with marks and without."""
    texts = [_marked(line) for line in re.findall(r"^\d+\. (.*)$", message, re.MULTILINE)]

    def errors(name: str) -> int:
        return sum(int((np.array(RULES[name](words)) != which).sum()) for words, which in texts)

    return min(PLANTED, key=errors)
