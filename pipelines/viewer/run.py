"""The server process: its address, its settings and its messages in the terminal."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable

import torch
import uvicorn
from starlette.types import ASGIApp

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.viewer.connections import CONNECTIONS, STRANGERS, Connection
from sae_harvest.pipelines.viewer.guard import is_loopback
from sae_harvest.pipelines.viewer.server import Viewer, make_app


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
    torch.set_num_threads(model_threads())  # also for the threads that answer requests
    listening = listen(host, port)
    port = listening.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/"
    if token is not None:
        address += f"?token={token}"
        warn(
            f"Warning: {host} can be reached from other machines, over a connection that is not "
            "encrypted; only a browser with the token in this address is let in."
        )
    say(f"{viewer.shown.tables.n_latents:,} latents at {address} (Ctrl-C ends)")
    config = configuration(make_app(viewer, token, f"sae_viewer_{port}"), "warning")
    uvicorn.Server(config).run(sockets=[listening])


def model_threads() -> int:
    """Return the number of model threads: OMP_NUM_THREADS, or else half of the processors.

    Torch's own default is all processors. Its threads wait for each other by spinning. If another
    program runs, such as the browser, a thread without a processor delays all others, and a text
    takes ten times as long.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // 2)


def configuration(
    app: ASGIApp, log_level: str, connection: type[Connection] = Connection
) -> uvicorn.Config:
    """Return the settings of uvicorn for the application."""
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",
        log_level=log_level,
        access_log=False,  # it would print the token and the search queries
        server_header=False,
        limit_concurrency=CONNECTIONS + STRANGERS,
        timeout_graceful_shutdown=2,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address; port 0 takes a free port."""
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
