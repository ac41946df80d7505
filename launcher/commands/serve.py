"""`lfm serve`: serve a model with the OpenAI protocol and a web page."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

from launcher.commands.parsing import Subcommands, command
from launcher.errors import ConfigurationError


def add_serve(commands: Subcommands) -> None:
    """Add `lfm serve` to the commands."""
    parser = command(
        commands,
        "serve",
        _serve,
        "Serve OpenAI chat completions at http://127.0.0.1:8000/v1, and a web page for questions at the same address. "
        "Requests are answered one after another.",
        "lfm serve runs/sample/export --port 8000",
    )
    parser.add_argument("model", help="exported folder or run folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but a loopback address requires a token"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for any free one")
    parser.add_argument(
        "--token",
        help="token that requests must send as `Authorization: Bearer` (default: LFM_TOKEN, which `ps` does not show)",
    )
    parser.add_argument("--name", help="name of the model in requests (default: its folder's name)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="maximum tokens that a request may ask for")
    parser.add_argument(
        "--max-waiting", type=int, default=16, help="maximum waiting requests; others are refused (429)"
    )
    parser.add_argument(
        "--request-seconds", type=float, default=120.0, help="time limit of a request, waiting included"
    )
    parser.add_argument("--body-bytes", type=int, default=2**20, help="maximum size of a request")


def _serve(options: argparse.Namespace) -> None:
    token = os.environ.get("LFM_TOKEN") if options.token is None else options.token
    token = token or None
    if options.host not in ("127.0.0.1", "localhost", "::1") and token is None:
        raise ConfigurationError(
            f"--host {options.host} admits other machines, which needs a token; set LFM_TOKEN or --token, "
            "or leave --host out"
        )
    for name, least in (("max_new_tokens", 1), ("max_waiting", 0), ("request_seconds", 0), ("body_bytes", 1)):
        if getattr(options, name) < least:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}"
            )

    import uvicorn

    from launcher.tools.inference.generation import load_model
    from launcher.tools.serving.connections import ImpatientProtocol
    from launcher.tools.serving.requests import Limits
    from launcher.tools.serving.server import build_app
    from launcher.tools.serving.worker import Worker

    listener = _listen(options.host, options.port)
    limits = Limits(
        body_bytes=options.body_bytes,
        new_tokens=options.max_new_tokens,
        seconds=options.request_seconds,
        waiting=options.max_waiting,
    )
    name = options.name or Path(options.model).resolve().name
    app = build_app(Worker(*load_model(options.model), limits), name, options.host, token)
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    host, port = listener.getsockname()[:2]
    print(f"{name} answers at http://{f'[{host}]' if ':' in host else host}:{port} (stop with Ctrl-C)", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"cannot listen on {host} port {port} ({error}); give another --port or --host"
        ) from error
