"""What stands before page and API: who may ask, by which name, for what, and how much at once. Plain ASGI."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

SMALL_BODY = 1_000_000  # what the page itself sends: texts and numbers
BODY_SECONDS = 60.0  # in which a body has to arrive
BODIES = 4  # read and worked on at a time, of those that may be large
SMALL_BODIES = 64  # and of all others: whoever sends a picture slowly must not hold up who asks a question
WAITING = 1000  # requests with a body that wait for their turn
WRONG_PASSWORD_SECONDS = 0.5

# What the page asks of Gradio, by its own log of requests, and nothing else of its sixty routes: not the one that
# serves files, not uploads, not proxies, not calls by name.
PAGE = re.compile(
    r"/|/theme\.css|/(assets|static)/[A-Za-z0-9_./-]+|/favicon\.ico"
    r"|/gradio_api/(queue/(join|data)|heartbeat/[a-z0-9]+|startup-events|reset|cancel)"
)

_GRADIO = "/gradio_api/"  # which fails at what its own page would not send; ours fail by a message in its queue

# Nothing is ever asked of another place, whatever a caption or a library brings in. Gradio's components are templates
# that are compiled in the browser, hence eval; all of its code is served from here.
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class Rules:
    """Who is let in.

    Parameters
    ----------
    password
        What HTTP's basic authentication must bring, with any user name; None asks for none.
    hosts
        The names by which a request may call this server, beside the numbers of IP; None allows every name. Without a
        password the name is what tells a page of another site, whose name was pointed here, from our own.
    bodies
        The most bytes of a body by path; `SMALL_BODY` for all others.
    open
        Paths of the API; `PAGE` has those of the page.
    """

    password: str | None
    hosts: frozenset[str] | None
    bodies: dict[str, int]
    open: re.Pattern[str]


def guarded(app: App, rules: Rules) -> App:
    """`app` behind `rules`. What is refused is answered with an `error`, a `hint` and the right status."""
    turns, small_turns, waiting = asyncio.Semaphore(BODIES), asyncio.Semaphore(SMALL_BODIES), 0

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        nonlocal waiting
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over websockets, and those know no origin
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = _refusal(scope, headers, rules)
        if refusal:
            if refusal.status == 401 and "authorization" in headers:
                await asyncio.sleep(WRONG_PASSWORD_SECONDS)
            await _refuse(send, refusal)
        elif scope["method"] in ("GET", "HEAD"):
            await app(scope, receive, _dressed(send))
        elif waiting >= WAITING:
            await _refuse(send, Refusal(503, "too many requests wait already", "ask again in a moment"))
        else:
            waiting += 1
            try:
                async with turns if scope["path"] in rules.bodies else small_turns:
                    await _with_body(app, scope, receive, send, rules.bodies.get(scope["path"], SMALL_BODY))
            finally:
                waiting -= 1

    return answer


@dataclass(frozen=True)
class Refusal:
    """Why a request goes no further."""

    status: int
    error: str
    hint: str


def _refusal(scope: Message, headers: dict[str, str], rules: Rules) -> Refusal | None:
    name = _name(headers.get("host", ""))
    if rules.hosts is not None and name not in rules.hosts and not _is_number(name):
        known = ", ".join(sorted(rules.hosts))
        return Refusal(421, f"this server is not called {name[:80]!r}", f"ask for {known} or its IP number")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return Refusal(403, "pages of other places may not ask here", "open the page of this server")
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
        return Refusal(403, "pages of other places may not ask here", "open the page of this server")
    if rules.password is not None and not _knows(headers.get("authorization", ""), rules.password):
        return Refusal(401, "this page has a password", "send it by HTTP basic authentication, with any user name")
    path = scope["path"]
    if not (PAGE.fullmatch(path) or rules.open.fullmatch(path)) or "//" in path or ".." in path:
        return Refusal(404, "there is nothing here", "/ is the page, /docs lists the API")
    most = rules.bodies.get(path, SMALL_BODY)
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > most:
        return _too_large(most)
    return None


def _name(host: str) -> str:
    """The name in a Host header, without its port: `[::1]:80` is `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".").lower()


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _knows(authorization: str, password: str) -> bool:
    """Compared by digests, so that the time says nothing of where two differ, nor of a length."""
    kind, _, given = authorization.partition(" ")
    try:
        said = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return False
    digests = (hashlib.sha256(one).digest() for one in (said, password.encode()))
    return kind.lower() == "basic" and hmac.compare_digest(*digests)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"more than {most:,} bytes", "send a smaller picture, or fewer at a time")


class _CutOffError(Exception):
    """Ends the reading of a body, wherever in the application that is."""


async def _with_body(app: App, scope: Message, receive: Receive, send: Send, most: int) -> None:
    """Let `app` answer, counting what it reads: a body without a length, or with a false one, is cut off too."""
    one = _Exchange(receive, _dressed(send), most, scope["path"].startswith(_GRADIO))
    try:
        await app(scope, one.read, one.answer)
    except Exception:
        if not one.refusal:
            raise
    if one.refusal and not one.begun:
        await _refuse(send, one.refusal)


class _Exchange:
    """A request whose body is being read, and its answer."""

    def __init__(self, receive: Receive, send: Send, most: int, of_gradio: bool) -> None:
        self._receive, self._send, self._most, self._of_gradio = receive, send, most, of_gradio
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS
        self._count, self._whole = 0, False
        self.refusal: Refusal | None = None
        self.begun = False

    async def read(self) -> Message:
        if self._whole:  # what comes now is that the other side went away
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            self.refusal = Refusal(408, f"the rest did not come within {BODY_SECONDS:.0f} seconds", "send it again")
            raise _CutOffError from None
        self._count += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._count > self._most:
            self.refusal = _too_large(self._most)
            raise _CutOffError
        return message

    async def answer(self, message: Message) -> None:
        if message.get("status") == 500 and self._of_gradio:
            self.refusal = Refusal(400, "this is nothing that the page asks", "load the page again")
        if self.refusal and not self.begun:  # libraries make another error of ours: it is not passed on
            return
        self.begun = True
        await self._send(message)


def _dressed(send: Send) -> Send:
    async def dressed(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        await send(message)

    return dressed


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"error": refusal.error, "hint": refusal.hint}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="cytoclip", charset="UTF-8"'))
    if refusal.status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    if refusal.status == 503:
        headers.append((b"retry-after", b"1"))
    await _dressed(send)({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_HEADERS = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
