# SPDX-License-Identifier: Apache-2.0
"""Runs the application until it is told to end, and drains it then."""

import ipaddress
import signal
import socket

import uvicorn
from fastapi import FastAPI

from prompt_tuning.errors import UserError
from prompt_tuning.serving import connections

# Clients commonly drop a connection after five idle seconds. A server that does so at the
# same time would cut off requests that are on their way.
KEEP_ALIVE_SECONDS = 75


def is_loopback(host: str) -> bool:
    """Whether a server on ``host`` is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections.

    Args:
      host: a name or an address of this machine.
      port: 0 takes any free one.

    Raises:
      UserError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}); choose another --port "
            "or --host"
        ) from error


def run(app: FastAPI, listener: socket.socket, drain_seconds: float) -> None:
    """Serves until SIGTERM or SIGINT; requests that were accepted are answered.

    Args:
      app: the application.
      listener: see `listen`.
      drain_seconds: how long those requests are waited for.
    """
    room = connections.Connections(connections.most(), connections.HEADER_SECONDS)
    config = uvicorn.Config(
        app,
        http=type("Connection", (connections.Connection,), {"room": room}),
        # Web sockets are not served, and would be connections of another kind.
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    # uvicorn drains on both signals and raises them again after that. A server that was
    # told to end and did has not failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])
