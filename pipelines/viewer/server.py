"""The routes: pages are files, `/api/...` answers with JSON or with one sentence."""

from __future__ import annotations

import json
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

from pipelines.live import LiveModel
from pipelines.steer import Clamp
from pipelines.viewer.compare import Comparison
from pipelines.viewer.guard import Guard
from pipelines.viewer.latent import latent_page
from pipelines.viewer.listing import PAGE, Listing, list_latents
from pipelines.viewer.models import BusyError, Models
from pipelines.viewer.notes import Notes
from pipelines.viewer.overview import overview
from pipelines.viewer.search import search
from pipelines.viewer.sql import FencedSQL
from pipelines.viewer.tables import SUMMARY, Tables
from store.errors import InputError, SaeHarvestError

STATIC = Path(__file__).parent / "static"
MOST_ROWS = 500


@dataclass(frozen=True)
class Shown:
    """One SAE's tables with everything the pages need of them."""

    tables: Tables
    notes: Notes
    models: Models

    @classmethod
    def open(cls, features: Path, open_model: Callable[[], LiveModel]) -> Shown:
        tables = Tables(features)
        notes = Notes.beside(tables.features, str(tables.run["sae_digest"]))
        return cls(tables, notes, Models(tables, open_model))

    @cached_property
    def overview(self) -> dict[str, Any]:
        return overview(self.tables)


@dataclass(frozen=True)
class Viewer:
    """What the server was started with."""

    shown: Shown
    other: Shown | None = None
    comparison: Comparison | None = None
    sql: FencedSQL | None = None

    def of(self, request: Request) -> Shown:
        """The SAE a request is about: `?sae=b` is the one compared with."""
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
) -> Viewer:
    """Open the tables; the model is loaded when a page first needs it.

    Args:
        saes: where to look for the SAEs compared, instead of where they were.

    Raises:
        RunError: a folder holds no tables. InputError: the SAEs cannot be compared.
    """
    shown = Shown.open(features, lambda: open_model(features, device))
    other = comparison = None
    if compare is not None:
        other = Shown.open(compare, lambda: open_model(compare, device))
        comparison = Comparison(shown.tables, other.tables, saes)
    return Viewer(shown, other, comparison, FencedSQL(features) if allow_sql else None)


def make_app(viewer: Viewer, token: str | None = None, cookie: str = "viewer") -> Starlette:
    """The ASGI application."""

    def api(answer: Callable[[Request, dict[str, Any]], Any], method: str = "GET") -> Any:
        async def endpoint(request: Request) -> Response:
            body: dict[str, Any] = {}
            if method == "POST":
                try:
                    body = json.loads(await request.body())
                except ValueError:
                    return _sentence(400, "The request is not JSON.")
                if not isinstance(body, dict):
                    return _sentence(400, "The request is not a JSON object.")
            try:
                return JSONResponse(await run_in_threadpool(answer, request, body))
            except BusyError as error:
                return _sentence(429, str(error))
            except InputError as error:
                return _sentence(400, str(error))
            except SaeHarvestError as error:
                return _sentence(500, str(error))

        return endpoint

    def start(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        shown = viewer.of(request)
        return shown.overview | {
            "compare": viewer.comparison.overview() if viewer.comparison else None,
            "sql": viewer.sql is not None,
            "notes_path": str(shown.notes.path),
        }

    def latents(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        shown = viewer.of(request)
        return list_latents(shown.tables, _listing(request, shown.notes))

    def latent(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        shown, number = viewer.of(request), request.path_params["latent"]
        page = latent_page(shown.tables, number)
        ours = shown is viewer.shown and viewer.comparison is not None
        return page | {
            "notes": shown.notes.get(number),
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
        shown, number = viewer.of(request), request.path_params["latent"]
        shown.tables.check(number)
        tags = _typed(body, "tags", list)
        if not all(isinstance(tag, str) for tag in tags):
            raise InputError("Tags are text.")
        return shown.notes.put(number, _typed(body, "note", str), tags)

    def live(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        return viewer.of(request).models.activations(_typed(body, "text", str))

    def steer(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        clamps = []
        for clamp in _typed(body, "clamps", list):
            if not isinstance(clamp, dict):
                raise InputError("A clamp is an object with latent and value.")
            clamps.append(Clamp(_typed(clamp, "latent", int), _number(clamp, "value")))
        return viewer.of(request).models.generate(
            _typed(body, "prompt", str),
            clamps,
            _typed(body, "n_tokens", int),
            _number(body, "temperature"),
            _typed(body, "seed", int),
        )

    def compared(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        if viewer.comparison is None:
            raise InputError("Start the server with --compare to see two SAEs side by side.")
        query = request.query_params
        return viewer.comparison.rows(
            query.get("desc") == "1",
            _float(query.get("low")),
            _float(query.get("high")),
            _integer(query.get("offset"), 0, 0),
            PAGE,
        )

    def sql(_: Request, body: dict[str, Any]) -> dict[str, Any]:
        if viewer.sql is None:
            raise InputError("SQL from the page is off; start the server with --allow-sql.")
        return viewer.sql.select(_typed(body, "sql", str))

    def home(_: Request) -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html")

    return Starlette(
        routes=[
            Route("/", home),
            Route("/api/start", api(start)),
            Route("/api/latents", api(latents)),
            Route("/api/latent/{latent:int}", api(latent)),
            Route("/api/latent/{latent:int}/notes", api(save, "POST"), methods=["POST"]),
            Route("/api/search", api(find)),
            Route("/api/notes", api(noted)),
            Route("/api/live", api(live, "POST"), methods=["POST"]),
            Route("/api/steer", api(steer, "POST"), methods=["POST"]),
            Route("/api/compare", api(compared)),
            Route("/api/sql", api(sql, "POST"), methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, token=token, cookie=cookie)],
    )


def _listing(request: Request, notes: Notes) -> Listing:
    """The query string of a list: `density=0.001..` is a range, `tag=` one of the notes'."""
    query = request.query_params
    between = {}
    for name in SUMMARY:
        if name in query:
            low, _, high = query[name].partition("..")
            between[name] = (_float(low), _float(high))
    latents = None
    if tag := query.get("tag"):
        latents = [n for n, entry in notes.noted().items() if tag in entry["tags"]]
    return Listing(
        sort=query.get("sort", "latent"),
        descending=query.get("desc") == "1",
        between=between,
        token=query.get("token", "")[:200],
        dead=query.get("dead") == "1",
        latents=latents,
        offset=_integer(query.get("offset"), 0, 0),
        limit=_integer(query.get("limit"), PAGE, 1, MOST_ROWS),
    )


def _integer(text: str | None, default: int, low: int, high: int = 2**31 - 1) -> int:
    if text is None:
        return default
    if not text.isdecimal() or not low <= int(text[:12]) <= high:
        raise InputError(f"{text[:20]!r} is not a whole number from {low} to {high}.")
    return int(text)


def _float(text: str | None) -> float | None:
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{text[:20]!r} is not a number.") from None


def _typed(body: dict[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"The request lacks {name}, or it is not of the right type.")
    return value


def _number(body: dict[str, Any], name: str) -> float:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"The request lacks {name}, or it is not a number.")
    return float(value)


def _sentence(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)
