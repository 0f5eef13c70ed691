"""Who is let in, and how much at once; held against an application that notes what reaches it."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cytoclip import guard
from cytoclip.guard import Rules

RULES = Rules(None, frozenset({"localhost"}), {"/take": 1000}, re.compile("/(take|say)"))
HOME = {"host": "127.0.0.1:7860"}


class Noting:
    """Reads the body and says how long it was."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.at_once = self.most_at_once = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope.get("path", scope["type"]))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        length, more = 0, scope["method"] not in ("GET", "HEAD")
        while more:
            message = await receive()
            length, more = length + len(message.get("body", b"")), message.get("more_body", False)
            await asyncio.sleep(0.001)
        self.at_once -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(length).encode()})


@pytest.fixture
def app() -> Noting:
    return Noting()


def ask(
    app: guard.App, path: str = "/", method: str = "GET", parts: tuple[bytes, ...] = (), **headers: str
) -> tuple[int, dict[str, str], bytes]:
    return asyncio.run(asked(app, path, method, parts, **headers))


async def asked(
    app: guard.App, path: str = "/", method: str = "GET", parts: tuple[bytes, ...] = (), **headers: str
) -> tuple[int, dict[str, str], bytes]:
    sent: list[Any] = []
    left: Iterator[bytes] = iter(parts)
    given = HOME | {key.replace("_", "-"): value for key, value in headers.items()}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(key.encode(), value.encode()) for key, value in given.items()],
    }

    async def receive() -> Any:
        part = next(left, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *bodies = sent
    found = {key.decode().lower(): value.decode() for key, value in start["headers"]}
    return start["status"], found, b"".join(one.get("body", b"") for one in bodies)


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "LocalHost.:99", "[::1]:7860", "192.168.3.4"])
def test_its_own_names_and_every_number_are_answered(app: Noting, host: str) -> None:
    assert ask(guard.guarded(app, RULES), host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", ""])
def test_another_name_is_refused(app: Noting, host: str) -> None:
    """A site whose name was pointed at this address (DNS rebinding) has the browser ask by that name."""
    status, _, body = ask(guard.guarded(app, RULES), host=host)
    assert (status, app.reached) == (421, [])
    assert json.loads(body)["hint"] == "ask for localhost or its IP number"
    assert ask(guard.guarded(app, replace(RULES, hosts=None)), host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_other_places_are_refused(app: Noting, method: str, headers: dict[str, str]) -> None:
    status, found, _ = ask(guard.guarded(app, RULES), "/say", method, **headers)
    assert (status, app.reached) == (403, [])
    assert not [key for key in found if key.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://127.0.0.1:7860"},
        {"sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"},
        {"sec_fetch_site": "none", "sec_fetch_mode": "navigate"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"},  # a link to us
    ],
)
def test_our_own_page_and_links_to_it_are_answered(app: Noting, headers: dict[str, str]) -> None:
    assert ask(guard.guarded(app, RULES), "/say", **headers)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/proxy=http://x.hf.space",
        "/gradio_api/call/look",
        "/gradio_api/run/predict",
        "/gradio_api/component_server",
        "/gradio_api/info",
        "/gradio_api/queue/join/../../file=/etc/passwd",
        "/gradio_api/vibe-edit",
        "/config",
        "/login",
        "/monitoring",
        "/static/../../../etc/passwd",
        "/assets//etc/passwd",
        "/assets/..%2f..",
        "/proc/self/environ",
        "/say/",
        "//say",
        "/sayx",
        "/\nsay",
    ],
)
def test_only_what_the_page_and_the_api_need_is_there(app: Noting, path: str) -> None:
    status, _, body = ask(guard.guarded(app, RULES), path)
    assert (status, app.reached) == (404, [])
    assert "there is nothing here" in json.loads(body)["error"]


def basic(said: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(said.encode()).decode()}


def test_a_password_guards_every_path(app: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WRONG_PASSWORD_SECONDS", 0.2)
    closed = guard.guarded(app, replace(RULES, password="correct hörse"))  # noqa: S106
    for path in ("/", "/say", "/gradio_api/queue/data", "/nothing"):
        status, headers, _ = ask(closed, path)
        assert (status, headers["www-authenticate"].partition(" ")[0]) == (401, "Basic")
    for wrong in ("u:correct horse", "u:", "correct hörse", "correct hörse:", "u:correct hörse "):
        began = time.monotonic()
        assert ask(closed, "/say", **basic(wrong))[0] == 401
        assert time.monotonic() - began > 0.2  # guesses are slow
    for broken in ("Basic", "Basic ====", "Bearer abc", "Basic \x7f"):
        assert ask(closed, "/say", authorization=broken)[0] == 401
    assert app.reached == []
    for user in ("", "anybody", "ü"):
        assert ask(closed, "/say", **basic(f"{user}:correct hörse"))[0] == 200


def test_a_long_body_is_refused_by_its_length_or_cut_off_while_it_comes(app: Noting) -> None:
    open_ = guard.guarded(app, RULES)
    assert ask(open_, "/take", "POST", (b"x" * 1000,), content_length="1000")[2] == b"1000"
    status, headers, body = ask(open_, "/take", "POST", (b"x" * 1001,), content_length="1001")
    assert (status, headers["connection"], app.reached) == (413, "close", ["/take"])
    assert json.loads(body)["error"] == "more than 1,000 bytes"
    for false in ("-1", "ten", "9" * 400, ""):
        assert ask(open_, "/take", "POST", (b"x",), content_length=false)[0] == 413
    parts = tuple(b"x" * 400 for _ in range(3))
    assert ask(open_, "/take", "POST", parts)[0] == 413
    assert ask(open_, "/take", "POST", parts, content_length="10")[0] == 413
    assert ask(open_, "/say", "POST", parts)[2] == b"1200"  # another path, another bound


def test_an_application_that_turns_the_cut_into_its_own_error_does_not_hide_it() -> None:
    async def swallowing(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (await receive())["more_body"]:
                pass
        except Exception:
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"bad"})

    assert ask(guard.guarded(swallowing, RULES), "/take", "POST", (b"x" * 1001,))[0] == 413


def test_a_slow_body_is_given_up(app: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)

    async def slow() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(0.04)  # always another byte, never the end
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/take", "headers": [(b"host", b"localhost")]}
        await guard.guarded(app, RULES)(scope, receive, send)
        return sent

    assert asyncio.run(slow())[0]["status"] == 408


def test_few_bodies_are_read_at_a_time_and_none_is_lost(app: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    async def many(count: int) -> list[int]:
        open_ = guard.guarded(app, RULES)
        return [one[0] for one in await asyncio.gather(*(asked(open_, "/take", "POST", (b"x",)) for _ in range(count)))]

    assert asyncio.run(many(50)) == [200] * 50
    assert app.most_at_once == guard.BODIES
    monkeypatch.setattr(guard, "WAITING", 20)
    assert sorted(asyncio.run(many(50))) == [200] * 20 + [503] * 30


def test_slow_pictures_do_not_hold_up_a_question() -> None:
    """As many as are read at once never end; what is small goes past them."""

    async def both() -> int:
        open_ = guard.guarded(Noting(), RULES)

        async def never() -> Any:
            await asyncio.sleep(3600)

        scope = {"type": "http", "method": "POST", "path": "/take", "headers": [(b"host", b"localhost")]}
        slow = [asyncio.create_task(open_(scope, never, send)) for _ in range(guard.BODIES)]
        await asyncio.sleep(0.01)
        try:
            found = await asyncio.wait_for(asked(open_, "/say", "POST", (b"x",)), 5)
        finally:
            for each in slow:
                each.cancel()
        return int(found[0])

    async def send(_: Any) -> None: ...

    assert asyncio.run(both()) == 200


def test_answers_say_that_nothing_is_asked_elsewhere(app: Noting) -> None:
    _, headers, _ = ask(guard.guarded(app, RULES), "/say")
    policy = headers["content-security-policy"]
    assert "http" not in policy
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["referrer-policy"] == "no-referrer"


def test_websockets_are_closed(app: Noting) -> None:
    async def open_() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await guard.guarded(app, RULES)({"type": "websocket", "path": "/", "headers": []}, receive, send)
        return sent

    assert asyncio.run(open_()) == [{"type": "websocket.close", "code": 1008}]
    assert app.reached == []
