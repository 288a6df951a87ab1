"""Checks of each request before it reaches a route: host, token, origin, size.

On loopback only the names of this machine are accepted, so that a foreign page cannot reach the
server by resolving its own domain to this machine (DNS rebinding). On any other address a token is
required. A request that changes something must come from our own pages, as JSON, within a deadline.
"""

from __future__ import annotations

import asyncio
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_harvest.pipelines.viewer.connections import ADMIT

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0  # time limit for a whole body
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class Guard:
    """ASGI middleware that refuses requests that fail a check.

    Args:
        token: required token; None requires none. A browser sends it once as `/?token=` and then
            as a cookie. `token` in other addresses is ignored.
        cookie: name of the cookie; one per port, as browsers share cookies between ports.
        body_seconds: time limit for the whole body of a request.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None = None,
        cookie: str = "viewer",
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._token, self._cookie = app, token, cookie
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        answer = self._refusal(scope, Headers(scope=scope))
        if answer is None and ADMIT in scope.get("extensions", {}):
            scope["extensions"][ADMIT]()
        if answer is None and scope["method"] == "POST":
            try:
                async with asyncio.timeout(self._body_seconds):
                    body = await _bounded_body(receive)
            except ClientDisconnect:
                return
            except TimeoutError:
                answer = _refused(408, "The request did not arrive in time.")
                answer.headers["connection"] = "close"
            else:
                if body is None:
                    answer = _refused(413, f"The request is larger than {MAX_BODY_BYTES:,} bytes.")
                else:
                    receive = _replay(body, receive)
        await (answer or self._app)(scope, receive, guarded_send)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | RedirectResponse | None:
        host = headers.get("host", "")
        if self._token is None:
            if _name(host) not in LOOPBACK:
                return _refused(421, "This server answers to 127.0.0.1 and localhost only.")
        elif answer := self._without_token(scope, headers, self._token):
            return answer
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return _refused(405, "Only GET and POST are answered.")
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and (
            scope["method"] == "POST" or scope["path"].startswith("/api/")
        ):
            return _refused(403, "Only the viewer's own pages may ask for this.")
        if scope["method"] == "POST":
            origin = headers.get("origin")
            if origin is not None and _netloc(origin) != host:
                return _refused(403, "Only the viewer's own pages may change anything.")
            if headers.get("content-type", "").split(";")[0].strip() != "application/json":
                return _refused(415, "Requests that change something are JSON.")
        return None

    def _without_token(
        self, scope: Scope, headers: Headers, token: str
    ) -> JSONResponse | RedirectResponse | None:
        """Return None if the request has the token; move a token in the address to a cookie."""
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["path"] == "/" and (given := query.pop("token", None)):
            if not _same(given[0], token):
                return _refused(403, "The token is wrong; open the address that was printed.")
            rest = urlencode(query, doseq=True)
            moved = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            moved.set_cookie(self._cookie, token, httponly=True, samesite="strict")
            return moved
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if self._cookie in cookies and _same(cookies[self._cookie].value, token):
            return None
        return _refused(
            401, "This server asks for a token; open the address that `sae-features serve` printed."
        )


def is_loopback(host: str) -> bool:
    """Whether a server bound to the host can only be reached from this machine."""
    return host in LOOPBACK


def _name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(address: str) -> str | None:
    """Return name and port of an address; None if it is not an address."""
    try:
        return urlsplit(address).netloc
    except ValueError:
        return None


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _refused(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


async def _bounded_body(receive: Receive) -> bytes | None:
    """Return the whole body; None if it is longer than `MAX_BODY_BYTES`.

    Raises:
        ClientDisconnect: the client disconnected before the end of the body.
    """
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first gives the body that was already read."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
