"""The settings of an endpoint, from which the options of commands are made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sae_harvest.common.numbers import Count
from sae_harvest.common.settings import Option


class EndpointSettings(BaseModel):
    """The settings of an endpoint.

    >>> EndpointSettings(base_url="http://localhost:8000/v1", model="qwen").api
    'completions'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: Annotated[str, Option("Endpoint", "URL", "--endpoint")] = Field(
        description="address of an OpenAI-compatible endpoint, such as https://api.openai.com/v1"
    )
    model: Annotated[str, Option("Endpoint", "NAME")] = Field(
        min_length=1, description="name of the model at the endpoint"
    )
    api: Annotated[Literal["completions", "chat"], Option("Endpoint")] = Field(
        "completions",
        description="API to ask: completions returns log-probabilities of the prompt, as vLLM "
        "does; chat does not, and is asked in words",
    )
    key_variable: Annotated[str, Option("Endpoint", "NAME")] = Field(
        "OPENAI_API_KEY", min_length=1, description="environment variable that holds the key"
    )
    timeout_seconds: Annotated[float, Option("Endpoint", "SECONDS", "--timeout")] = Field(
        120.0, gt=0, le=86_400, description="time for one attempt in all"
    )
    attempts: Annotated[Count, Option("Endpoint")] = Field(
        5, ge=1, le=100, description="attempts at a request before it has failed"
    )
    concurrency: Annotated[Count, Option("Endpoint", "REQUESTS")] = Field(
        8, ge=1, le=1000, description="requests under way at a time"
    )
    requests_per_minute: Annotated[float | None, Option("Endpoint", "REQUESTS")] = Field(
        None, gt=0, description="attempts that begin in a minute, at most; none: no limit"
    )
    budget_tokens: Annotated[Count | None, Option("Endpoint", "TOKENS")] = Field(
        None,
        ge=0,
        description="tokens, read and generated, after which no more requests begin; none: no "
        "limit",
    )
    top_logprobs: Annotated[Count, Option("Endpoint", "TOKENS")] = Field(
        20, ge=1, description="log-probabilities to ask for at each token; a choice beyond has 0"
    )

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        import httpx2  # slow to import, and a command without an endpoint does not need it

        try:
            url = httpx2.URL(value)
        except httpx2.InvalidURL:
            url = httpx2.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(
                "the address of an endpoint begins with http:// or https:// and a host"
            )
        if url.userinfo or url.query:
            raise ValueError("the address of an endpoint has no password and no query")
        return value.rstrip("/")
