"""`cytoclip serve`: page and API of an index on a port, until they are asked to stop."""

from __future__ import annotations

import errno
import functools
import importlib.util
import ipaddress
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytoclip import guard, signals
from cytoclip.console import Console
from cytoclip.desk import Desk
from cytoclip.errors import ExitCode, UserError, counted
from cytoclip.guard import Rules
from cytoclip.search import Index

SHORTEST = 8  # characters of a password
MAX_CONNECTIONS = 1000
_IDLE = 75  # seconds; longer than clients and proxies keep a connection, or it is closed under a request on its way
_LAST_ANSWERS = 3  # seconds that requests in hand have when the server is asked to stop


@dataclass(frozen=True)
class Where:
    """Where to listen, and who may come.

    Parameters
    ----------
    port
        0 takes a free one.
    password
        What HTTP basic authentication must bring, with any user name; None asks for none.
    public
        Whether others than this machine may come without a password.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = None
    public: bool = False


def serve(folder: Path, where: Where, console: Console, model: str | None = None, roots: Sequence[Path] = ()) -> int:
    """Serve the index in `folder` until a signal; the number of that signal.

    `model` and `roots` say where model and pictures lie by now, as for `Index.open`.

    Raises
    ------
    UserError
        The index or its model cannot be opened, or nobody may or can listen there.
    """
    allowed(where)
    with listening(where) as ears, _own_folder():
        app = application(_opened(folder, model, roots, console), where)
        console.say(f"{url(where.host, ears.getsockname()[1])} is open; Ctrl-C ends it")
        if not is_loopback(where.host):
            console.warn(
                "others can read along what is not encrypted: put a proxy with TLS in front (docs/guide/serve.md)"
            )
        with signals.heard() as asked, running(app, ears) as thread:
            while thread.is_alive() and not asked():
                thread.join(0.2)
            number = asked()
        console.say("stopped")
        return number


def allowed(where: Where) -> None:
    """Refuse a place that others can reach without a password, and passwords that are none."""
    if where.password is not None and len(where.password) < SHORTEST:
        raise UserError(f"the password has fewer than {SHORTEST} characters", "take a longer one")
    if where.password is not None and where.public:
        raise UserError("--public and --password contradict each other", "leave --public out: the password guards it")
    if not is_loopback(where.host) and where.password is None and not where.public:
        raise UserError(
            f"on {where.host} everybody in the network could search and see the pictures",
            "give a --password (or CYTOCLIP_PASSWORD), or say that it is meant: --public",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def application(index: Index, where: Where) -> guard.App:
    """Page and API of an index, behind the rules for who may come."""
    from cytoclip import api, search_page

    at = Desk(index)
    app = api.application(at)
    search_page.mount(app, at)
    return guard.guarded(app, Rules(where.password, _hosts(where), api.BODIES, api.PATHS))


def url(host: str, port: int) -> str:
    """What to type into a browser on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@contextmanager
def listening(where: Where) -> Iterator[socket.socket]:
    """The port, taken: before the model is loaded, so that nobody waits for a message."""
    host, port = where.host, where.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise UserError(
            f"--host {host} is no address", "such as 127.0.0.1, or 0.0.0.0 for all", ExitCode.USAGE
        ) from None
    with socket.socket(family, kind, protocol) as ears:
        ears.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ears.bind(address)
            ears.listen(MAX_CONNECTIONS)
        except OSError as error:
            raise _unbound(host, port, error) from None
        yield ears


def _opened(folder: Path, model: str | None, roots: Sequence[Path], console: Console) -> Index:
    """The index with its model ready, so that the first question is answered as fast as all others."""
    for needed in ("gradio", "fastapi", "uvicorn"):
        if importlib.util.find_spec(needed) is None:
            raise UserError(f"{needed} is not installed", "pip install 'cytoclip[serve]'", ExitCode.SYSTEM)
    index = Index.open(folder, model=model, roots=roots)
    console.say(f"{counted(len(index), 'pair')} of {folder}, model {index.encoder.name}")
    index.encoder.embed_texts("ready")
    return index


def _hosts(where: Where) -> frozenset[str] | None:
    """By which names this server may be called. With a password by any: another site's page does not know it."""
    if where.password is not None:
        return None
    names = {"localhost", where.host.lower()}
    if not is_loopback(where.host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names)


def _unbound(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        hint = f"stop what listens there, or take another: --port {min(port + 1, 65535)}, --port 0 for any free one"
        return UserError(f"port {port} of {host} is taken", hint, ExitCode.SYSTEM)
    if error.errno == errno.EACCES:
        return UserError(f"nobody but root may listen on port {port}", "take one from 1024 on", ExitCode.SYSTEM)
    hint = "127.0.0.1 is this machine alone, 0.0.0.0 all of its addresses"
    return UserError(f"cannot listen on {host}: {os.strerror(error.errno or 0)}", hint, ExitCode.SYSTEM)


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder for whatever libraries write while a request is read; gone at the end."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="cytoclip-serve-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before
            del os.environ["GRADIO_TEMP_DIR"]


@contextmanager
def running(app: guard.App, ears: socket.socket) -> Iterator[threading.Thread]:
    """Answer on `ears` in a thread of its own, so that the main one hears signals; ended on the way out."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="error",  # a fault of ours has its traceback; what was asked is not logged
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_LAST_ANSWERS,
        ws="none",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=functools.partial(_run, server, ears), name="server")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield thread
    finally:
        log = logging.getLogger("uvicorn.error")
        level = log.level
        log.setLevel(logging.CRITICAL)  # pages that are open are cut off, which is no fault
        server.should_exit = True
        thread.join()
        log.setLevel(level)


def _run(server: Any, ears: socket.socket) -> None:
    server.run(sockets=[ears])
