"""Options that choose the language model: a local one, or an endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from sae_harvest.common.console import device_option
from sae_harvest.common.options import NameOption, grouped
from sae_harvest.common.settings import Setting, options_for, settings_of
from sae_harvest.pipelines.explain.client.settings import EndpointSettings

if TYPE_CHECKING:
    from sae_harvest.pipelines.explain.client.endpoint import EndpointClient
    from sae_harvest.pipelines.explain.client.local import LocalClient

DEFAULT_MODEL = "smollm2-135m"
MODEL, ATTEMPTS = "model", "attempts"  # `--model` is for both clients; attempts have no option


def _settings() -> list[Setting]:
    """Return the settings of an endpoint that have options of their own."""
    every = settings_of(EndpointSettings)
    return [setting for setting in every if setting.path[0] not in (MODEL, ATTEMPTS)]


def client_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose the language model."""
    model = grouped(
        "Language model",
        "--model",
        type=NameOption(),
        default=DEFAULT_MODEL,
        show_default=True,
        help="Model that explains and scores: a Hub id, a folder, a GGUF file; with --endpoint the "
        "name that the server knows.",
    )
    return model(options_for(_settings())(device_option(command)))


def open_client(given: dict[str, Any]) -> LocalClient | EndpointClient:
    """Return the client that the options name; they are taken out of `given`.

    Raises:
        InputError: there is no such model or device.
        click.UsageError: an option of the endpoint is given without it, or has a bad value.
    """
    typed = {setting: given.pop(setting.parameter) for setting in _settings()}
    fields = {setting.path[0]: value for setting, value in typed.items() if value is not None}
    model, device = given.pop(MODEL), given.pop("device")
    if "base_url" not in fields:
        for setting, value in typed.items():
            if value is not None:
                raise click.UsageError(
                    f"{setting.spelling} is for an endpoint; give --endpoint as well."
                )
        from sae_harvest.pipelines.explain.client.local import LocalClient

        return LocalClient(model, device)
    from sae_harvest.pipelines.explain.client.endpoint import EndpointClient

    try:
        return EndpointClient(EndpointSettings(model=model, **fields))
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"--endpoint: {first['msg']} ({first['loc'][0]}).") from None
