"""Options that choose the language model: a local one, or an endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from sae_harvest.common.console import device_option
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import NameOption, grouped

if TYPE_CHECKING:
    from sae_harvest.pipelines.explain.client.endpoint import EndpointClient
    from sae_harvest.pipelines.explain.client.local import LocalClient

MODEL, SERVER = "Language model", "Endpoint"
DEFAULT_MODEL = "smollm2-135m"
# option → field of the endpoint's settings
FIELDS = {
    "endpoint": "base_url",
    "model": "model",
    "api": "api",
    "key_variable": "key_variable",
    "timeout": "timeout_seconds",
    "concurrency": "concurrency",
    "requests_per_minute": "requests_per_minute",
    "budget_tokens": "budget_tokens",
    "top_logprobs": "top_logprobs",
}
OPTIONS = (
    grouped(
        MODEL,
        "--model",
        type=NameOption(),
        default=DEFAULT_MODEL,
        show_default=True,
        help="Model that explains and scores: a Hub id, a folder, a GGUF file; with --endpoint the "
        "name that the server knows.",
    ),
    grouped(
        SERVER,
        "--endpoint",
        metavar="URL",
        help="OpenAI-compatible server to ask, such as http://localhost:8000/v1; none: the model "
        "runs here.",
    ),
    grouped(
        SERVER,
        "--api",
        type=click.Choice(["completions", "chat"]),
        default="completions",
        show_default=True,
        help="completions: the server returns log-probabilities of a prompt, as vLLM does; chat: "
        "it does not, and is asked in words.",
    ),
    grouped(
        SERVER,
        "--key-variable",
        metavar="NAME",
        default="OPENAI_API_KEY",
        show_default=True,
        help="Environment variable with the key of the server.",
    ),
    grouped(
        SERVER,
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Longest time of a request. [default: 120]",
    ),
    grouped(
        SERVER, "--concurrency", type=CountRange(min=1), help="Requests at a time. [default: 8]"
    ),
    grouped(
        SERVER, "--requests-per-minute", type=CountRange(min=1), help="Most requests a minute."
    ),
    grouped(
        SERVER,
        "--budget-tokens",
        type=CountRange(min=1),
        help="Most tokens that may be read and written; requests after that fail.",
    ),
    grouped(
        SERVER,
        "--top-logprobs",
        type=CountRange(min=1),
        help="Log-probabilities that the server returns for a token. [default: 20]",
    ),
    device_option,
)


def client_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose the language model."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def open_client(given: dict[str, Any]) -> LocalClient | EndpointClient:
    """Return the client that the options name; they are taken out of `given`.

    Raises:
        InputError: there is no such model or device.
        click.UsageError: an option of the endpoint is given without it, or has a bad value.
    """
    options = {name: given.pop(name) for name in FIELDS}
    device = given.pop("device")
    if options["endpoint"] is None:
        from sae_harvest.pipelines.explain.client.local import LocalClient

        for name in ("timeout", "concurrency", "requests_per_minute", "budget_tokens"):
            if options[name] is not None:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} is for an endpoint; give --endpoint as well."
                )
        return LocalClient(options["model"], device)
    from sae_harvest.pipelines.explain.client.endpoint import EndpointClient, EndpointSettings

    fields = {FIELDS[name]: value for name, value in options.items() if value is not None}
    try:
        return EndpointClient(EndpointSettings(**fields))
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"--endpoint: {first['msg']} ({first['loc'][0]}).") from None
