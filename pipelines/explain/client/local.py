"""A model of transformers, or a GGUF file, on this machine.

It runs in float32 on a CPU and in bfloat16 on a GPU. Readings are exact. A text is continued in
the same way whatever else is asked; see `continuing` for the limits of that in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel

from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.models import (
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from sae_harvest.pipelines.explain.client.batches import batches
from sae_harvest.pipelines.explain.client.continuing import Continuing
from sae_harvest.pipelines.explain.client.interface import (
    A,
    Failure,
    Generation,
    Message,
    Numbered,
    OnAnswer,
    Read,
    Reading,
    Request,
    Tally,
    Text,
    Usage,
    in_order,
    unheard,
)
from sae_harvest.pipelines.explain.client.readings import ChoiceLogits, Placed, first_tokens, placed

BATCH_TOKENS = 1 << 12


class LocalClient:
    """A language model that this process runs."""

    reads = True

    def __init__(self, name: str, device: str = "auto", batch_tokens: int = BATCH_TOKENS) -> None:
        """Find the model; it is loaded when it is first asked.

        Args:
            name: a Hub id, a folder, a GGUF file, or `smollm2-135m`, as for a harvest.
            device: cpu, cuda or auto.
            batch_tokens: tokens of a forward pass, at most; a longer text is alone.

        Raises:
            InputError: there is no such model, or no such device.
        """
        self._resolved = resolve_model(name)
        self._config = load_config(self._resolved)
        self._device = choose_device(device)
        self._dtype = torch.float32 if self._device == "cpu" else torch.bfloat16
        self._batch_tokens = batch_tokens
        self.tally = Tally()

    @cached_property
    def identity(self) -> str:
        """The model with its weights and its dtype."""
        weights = model_fingerprint(self._resolved)["weights"]
        return f"{self._resolved.name} {weights} {str(self._dtype).removeprefix('torch.')}"

    def generate(
        self, requests: Sequence[Generation], on_answer: OnAnswer = unheard
    ) -> list[Text | Failure]:
        """Answer generations, several at once."""
        return in_order(self._generated(requests), len(requests), on_answer)

    def read(
        self, requests: Sequence[Reading], on_answer: OnAnswer = unheard
    ) -> list[Read | Failure]:
        """Answer readings; consecutive ones with the same prefix share its computation."""
        return in_order(self._read(requests), len(requests), on_answer)

    def n_tokens(self, request: Request) -> int:
        """Count the tokens that the model reads to answer a request."""
        if isinstance(request, Generation):
            return len(self._prompt(request))
        return len(self._tokenizer.encode(request.prefix + request.text))

    def _generated(self, requests: Sequence[Generation]) -> Numbered[Text | Failure]:
        prompts = [self._prompt(request) for request in requests]
        fitting = []
        for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            if failure := self._too_long(len(prompt) + request.max_tokens):
                yield number, self._noted(failure)
            else:
                fitting.append(number)
        if not fitting:
            return
        run = self._continuing
        for some in batches([len(prompts[n]) for n in fitting], self._batch_tokens, run.pads):
            numbers = [fitting[place] for place in some]
            new = run([prompts[n] for n in numbers], [requests[n] for n in numbers])
            for number, tokens in zip(numbers, new, strict=True):
                text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
                usage = Usage(len(prompts[number]), len(tokens))
                yield number, self._noted(Text(text, usage))

    def _read(self, requests: Sequence[Reading]) -> Numbered[Read | Failure]:
        first = 0
        for _, some in groupby(requests, key=lambda request: (request.prefix, request.choices)):
            alike = list(some)
            for number, answer in self._read_alike(alike):
                yield first + number, self._noted(answer)
            first += len(alike)

    def _read_alike(self, requests: Sequence[Reading]) -> Numbered[Read | Failure]:
        """Answer readings with the same prefix and the same choices."""
        choices = self._choices(requests[0])
        numbers, texts = [], []
        for number, request in enumerate(requests):
            one = placed(self._tokenizer, request)
            failure = one if isinstance(one, Failure) else self._too_long(len(one.ids))
            if isinstance(one, Placed) and failure is None:
                numbers.append(number)
                texts.append(one)
            elif failure is not None:
                yield number, failure
        if not texts:
            return
        for place, logits in self._choice_logits.of(texts, choices, self._batch_tokens):
            probability = torch.softmax(logits.double(), dim=-1).cpu().numpy()
            yield numbers[place], Read(probability, Usage(len(texts[place].ids), 0))

    def _choices(self, request: Reading) -> list[int]:
        """Return the first token of each choice. Raise `InputError` if two are the same."""
        found = first_tokens(self._tokenizer, request)
        if len(set(found)) < len(found):
            raise InputError(
                f"For the tokenizer of {self._resolved.name}, two of the choices "
                f"{', '.join(map(repr, request.choices))} begin with the same token; use a prompt "
                "with other choices, or another model."
            )
        return found

    def _prompt(self, request: Generation) -> list[int]:
        """Return the tokens of a conversation, by the model's own template if it has one.

        Otherwise a turn is `User: TEXT` and an empty line, and the answer follows `Assistant:`.
        """
        if self._tokenizer.chat_template is None:
            turns = [f"{m.role.capitalize()}: {m.text}\n\n" for m in request.messages]
            return list(self._tokenizer.encode("".join(turns) + "Assistant:"))
        try:
            text = self._templated(request.messages)
        except TemplateError:  # some templates have no place for a system message
            text = self._templated(_without_system(request.messages))
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _templated(self, messages: Sequence[Message]) -> str:
        turns = [{"role": m.role, "content": m.text} for m in messages]
        text: str = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        return text

    def _too_long(self, tokens: int) -> Failure | None:
        most = getattr(self._config.get_text_config(decoder=True), "max_position_embeddings", None)
        if most is not None and tokens > most:
            return Failure(f"too long: {tokens:,} tokens, the model reads {most:,}")
        return None

    def _noted(self, answer: A) -> A:
        if isinstance(answer, Failure):
            self.tally.failed(answer)
        else:
            self.tally.asked += 1
            self.tally.used(answer.usage)
        return answer

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_model(self._resolved, self._dtype, self._device)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._resolved)

    @cached_property
    def _choice_logits(self) -> ChoiceLogits:
        return ChoiceLogits(self._model)

    @cached_property
    def _continuing(self) -> Continuing:
        settings: Any = self._model.generation_config
        ends = settings.eos_token_id if settings is not None else None
        ends = ends if isinstance(ends, list) else [ends]
        known = {end for end in (*ends, self._tokenizer.eos_token_id) if end is not None}
        return Continuing(self._model, known)


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation whose system message begins the user's first turn."""
    if messages[0].role != "system" or len(messages) == 1:
        return list(messages)
    first, second, *rest = messages
    return [Message(second.role, f"{first.text}\n\n{second.text}"), *rest]
