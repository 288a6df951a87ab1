"""The server process: where it listens, and what it tells the person who started it."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable

import uvicorn

from pipelines.viewer.guard import is_loopback
from pipelines.viewer.server import Viewer, make_app
from store.errors import InputError

CONNECTIONS = 64  # answered at a time; more are turned away


def run_server(
    viewer: Viewer,
    host: str,
    port: int,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Serve until interrupted.

    Raises:
        InputError: the address cannot be listened on.
    """
    listening = listen(host, port)
    port = listening.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/"
    if token is not None:
        address += f"?token={token}"
        warn(
            f"Warning: {host} can be reached from other machines, over a connection that is not "
            "encrypted; only who has this address with its token gets in."
        )
    say(f"{viewer.shown.tables.n_latents:,} latents at {address} (Ctrl-C ends)")
    config = uvicorn.Config(
        make_app(viewer, token, f"sae_viewer_{port}"),
        log_level="warning",
        access_log=False,  # would print the token, and what was searched for
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; 0 takes a free port."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise InputError(
            f"Cannot listen on {host} port {port} ({error.strerror}); "
            "choose another --port, or 0 for a free one."
        ) from error
    return listening
