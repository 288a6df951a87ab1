"""The routes: pages are files; `/api/...` answers with JSON, errors with one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sae_harvest.common.errors import InputError, RunError, SaeHarvestError
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.viewer.compare import Comparison
from sae_harvest.pipelines.viewer.guard import BODY_SECONDS, Guard
from sae_harvest.pipelines.viewer.latent import latent_page
from sae_harvest.pipelines.viewer.listing import PAGE, list_latents
from sae_harvest.pipelines.viewer.matches import Matches
from sae_harvest.pipelines.viewer.models import BusyError, Models
from sae_harvest.pipelines.viewer.notes import Notes
from sae_harvest.pipelines.viewer.overview import overview
from sae_harvest.pipelines.viewer.parameters import (
    body_of,
    clamps_of,
    latent_of,
    listing_of,
    number_of,
    real,
    seed_of,
    tags_of,
    text_of,
    whole,
    whole_of,
)
from sae_harvest.pipelines.viewer.search import search
from sae_harvest.pipelines.viewer.sql import FencedSQL
from sae_harvest.pipelines.viewer.stream import AnswerStream
from sae_harvest.pipelines.viewer.tables import Tables

STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class ServedSAE:
    """One SAE's tables with their notes and their model."""

    tables: Tables
    """The tables of the feature build."""

    notes: Notes
    """Notes and tags of the SAE's latents."""

    models: Models
    """Live text and steering with the SAE's model."""

    @classmethod
    def open(cls, features: Path, open_model: Callable[[], LiveModel]) -> ServedSAE:
        tables = Tables(features)
        notes = Notes.beside(tables.features, str(tables.run["sae_digest"]))
        return cls(tables, notes, Models(tables, open_model))

    @cached_property
    def overview(self) -> dict[str, Any]:
        return overview(self.tables)


@dataclass(frozen=True)
class Viewer:
    """The SAEs and queries that the server offers."""

    shown: ServedSAE
    """The SAE of --features."""

    other: ServedSAE | None = None
    """The SAE of --compare."""

    comparison: Comparison | None = None
    """Comparison of the two SAEs."""

    matches: Matches | None = None
    """Classes of their latents, from --matches."""

    sql: FencedSQL | None = None
    """SQL from the page; None if --allow-sql was not given."""

    def of(self, request: Request) -> ServedSAE:
        """Return the SAE that a request asks for; `?sae=b` is the SAE of --compare."""
        if request.query_params.get("sae", "a") == "a":
            return self.shown
        if self.other is None:
            raise InputError("This server shows one SAE only; start it with --compare.")
        return self.other


def open_viewer(
    features: Path,
    compare: Path | None = None,
    allow_sql: bool = False,
    device: str = "cpu",
    open_model: Callable[[Path, str], LiveModel] = LiveModel.open,
    saes: Sequence[Path] = (),
    matches: Path | None = None,
) -> Viewer:
    """Open the tables; the model is loaded when a page first needs it.

    Args:
        saes: folders of the compared SAEs, if they have moved.
        matches: folder that `sae-features diff` wrote for the two SAEs.

    Raises:
        RunError: a folder holds no tables, or no matches of these two SAEs.
        InputError: the SAEs cannot be compared.
    """
    shown = ServedSAE.open(features, lambda: open_model(features, device))
    other = comparison = found = None
    if matches is not None and compare is None:
        raise InputError("Matches are of two SAEs; give the tables of the second with --compare.")
    if compare is not None:
        other = ServedSAE.open(compare, lambda: open_model(compare, device))
        comparison = Comparison(shown.tables, other.tables, saes)
        if matches is not None:
            found = Matches(matches, shown.tables, other.tables)
    return Viewer(shown, other, comparison, found, FencedSQL(features) if allow_sql else None)


def make_app(
    viewer: Viewer,
    token: str | None = None,
    cookie: str = "viewer",
    body_seconds: float = BODY_SECONDS,
) -> Starlette:
    """Return the ASGI application."""

    def api(answer: Callable[[Request, dict[str, Any]], Any], method: str = "GET") -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                body = body_of(await request.body()) if method == "POST" else {}
                found = await run_in_threadpool(answer, request, body)
                if isinstance(found, AnswerStream):
                    return await found.response(request)
                return JSONResponse(found)
            except BusyError as error:
                return _sentence(429, str(error))
            except InputError as error:
                return _sentence(400, str(error))
            except SaeHarvestError as error:  # tables, model or notes; the user can repair them
                return _sentence(409, str(error))

        return endpoint

    def asked(request: Request) -> int:
        return latent_of(request.path_params["latent"], viewer.of(request).tables.n_latents)

    def start(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        shown = viewer.of(request)
        return shown.overview | {
            "compare": viewer.comparison.overview() if viewer.comparison else None,
            "matches": viewer.matches.overview() if viewer.matches else None,
            "sql": viewer.sql is not None,
            "notes_path": str(shown.notes.path),
        }

    def latents(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        shown = viewer.of(request)
        return list_latents(shown.tables, listing_of(request.query_params, shown.notes))

    def latent(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        shown, number = viewer.of(request), asked(request)
        page = latent_page(shown.tables, number)
        ours = shown is viewer.shown and viewer.comparison is not None
        return page | {
            "notes": notes_of(shown, number),
            "nearest": viewer.comparison.of(number) if ours and viewer.comparison else None,
        }

    def find(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        return search(viewer.of(request).tables, request.query_params.get("q", ""))

    def noted(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        shown = viewer.of(request)
        found = shown.notes.noted()
        labels = shown.tables.labels(list(found))
        rows = [{"latent": n} | e | {"label": labels.get(n)} for n, e in found.items()]
        return {"rows": rows, "path": str(shown.notes.path)}

    def save(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        shown, number = viewer.of(request), asked(request)
        shown.tables.check(number)
        return shown.notes.put(number, text_of(body, "note"), tags_of(body))

    def live(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        return viewer.of(request).models.activations(text_of(body, "text"))

    def steer(request: Request, body: dict[str, Any]) -> AnswerStream:
        models = viewer.of(request).models
        given = (
            text_of(body, "prompt"),
            clamps_of(body),
            whole_of(body, "n_tokens"),
            number_of(body, "temperature"),
            seed_of(body),
        )
        return AnswerStream(lambda tell: models.generate(*given, tell))

    def compared(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        if viewer.comparison is None:
            raise InputError("Start the server with --compare to see two SAEs side by side.")
        query = request.query_params
        return viewer.comparison.rows(
            query.get("desc") == "1",
            real(query.get("low")),
            real(query.get("high")),
            whole(query.get("offset"), 0, 0),
            PAGE,
        )

    def matched(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        if viewer.matches is None:
            raise InputError("Start the server with --matches to see the classes of latents.")
        query = request.query_params
        return viewer.matches.page(query.get("class", ""), whole(query.get("offset"), 0, 0))

    def sql(_: Request, body: dict[str, Any]) -> dict[str, Any]:
        if viewer.sql is None:
            raise InputError("SQL from the page is off; start the server with --allow-sql.")
        return viewer.sql.select(text_of(body, "sql"))

    def home(_: Request) -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html")

    return Starlette(
        routes=[
            Route("/", home),
            Route("/api/start", api(start)),
            Route("/api/latents", api(latents)),
            Route("/api/latent/{latent}", api(latent)),
            Route("/api/latent/{latent}/notes", api(save, "POST"), methods=["POST"]),
            Route("/api/search", api(find)),
            Route("/api/notes", api(noted)),
            Route("/api/live", api(live, "POST"), methods=["POST"]),
            Route("/api/steer", api(steer, "POST"), methods=["POST"]),
            Route("/api/compare", api(compared)),
            Route("/api/matches", api(matched)),
            Route("/api/sql", api(sql, "POST"), methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, token=token, cookie=cookie, body_seconds=body_seconds)],
    )


def notes_of(shown: ServedSAE, latent: int) -> dict[str, Any]:
    """Return note and tags of a latent, or `problem` if their file is damaged."""
    try:
        return shown.notes.get(latent)
    except RunError as error:
        return {"note": "", "tags": [], "problem": str(error)}


def _sentence(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)
