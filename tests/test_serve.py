"""A server as it is started and ended: where it listens, who gets in, what is left behind, and many askers at once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cytoclip import desk, guard, serve
from cytoclip.errors import ExitCode
from cytoclip.search import Index
from cytoclip.serve import Where
from tests import served
from tests.typed import Run, refused

PARALLEL = 200
CLIENT = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=PARALLEL, max_keepalive_connections=PARALLEL))


@pytest.fixture(scope="module")
def index(sample: served.Sample) -> Index:
    return Index.open(sample.index)


@pytest.fixture(scope="module")
def address(index: Index) -> Iterator[str]:
    with served.server(index) as found:
        yield found


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_on_this_machine_alone_no_password_is_asked(host: str) -> None:
    serve.allowed(Where(host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", "", "127.0.0.1.example.org"])  # noqa: S104
def test_others_come_by_password_or_by_public(run: Run, sample: served.Sample, host: str) -> None:
    said, hint = refused(run("serve", str(sample.index), "--host", host), ExitCode.USAGE)
    assert "everybody in the network" in said
    assert "--public" in hint
    serve.allowed(Where(host, password="long enough"))  # noqa: S106
    serve.allowed(Where(host, public=True))


def test_a_password_is_one(run: Run, sample: served.Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fewer than 8" in refused(run("serve", str(sample.index), "--password", "short"))[0]
    both = ("--public", "--password", "long enough")
    assert "contradict" in refused(run("serve", str(sample.index), *both))[0]
    monkeypatch.setenv("CYTOCLIP_PASSWORD", "short")
    assert "fewer than 8" in refused(run("serve", str(sample.index)))[0]


def test_a_place_where_nobody_can_listen_is_said_before_the_model_is_opened(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said, hint = refused(run("serve", str(tmp_path), "--port", str(port)), ExitCode.SYSTEM)
    assert said == f"port {port} of 127.0.0.1 is taken"
    assert f"--port {port + 1}" in hint
    words = ("serve", str(tmp_path), "--host", "203.0.113.7", "--public", "--port", "0")  # a documentation address
    assert "cannot listen on 203.0.113.7" in refused(run(*words), ExitCode.SYSTEM)[0]
    words = ("serve", str(tmp_path), "--host", "no such name", "--public")
    assert "--host no such name is no address" in refused(run(*words))[0]
    assert "--port" in refused(run("serve", str(tmp_path), "--port", "65536"))[0]
    assert "is no index" in refused(run("serve", str(tmp_path), "--port", "0"), ExitCode.DATA)[0]


def test_a_missing_library_names_the_extra(run: Run, sample: served.Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    there = serve.importlib.util.find_spec
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "gradio" else there(name))
    said, hint = refused(run("serve", str(sample.index), "--port", "0"), ExitCode.SYSTEM)
    assert (said, hint) == ("gradio is not installed", "pip install 'cytoclip[serve]'")


def test_ctrl_c_ends_it_and_nothing_is_left(sample: served.Sample, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "cytoclip", "serve", str(sample.index), "--port", "0"]
    environment = os.environ | {"TMPDIR": str(scratch), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "home").mkdir()
    started = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert started.stderr
    lines = []
    for line in started.stderr:
        lines.append(line)
        if "is open" in line:
            break
    found = re.match(r"(http://127\.0\.0\.1:\d+) is open; Ctrl-C ends it\n", lines[-1])
    assert found, lines
    address = found.group(1)
    picture = sample.picture(4).read_bytes() + b"\0" * 3_000_000  # large enough that Starlette puts it on a disk
    hits = CLIENT.post(f"{address}/search", files={"image": picture}).json()["hits"]
    assert hits[0]["name"] == sample.entries[4]["img"]
    assert CLIENT.post(f"{address}/picture", content=picture).status_code == 200
    assert CLIENT.get(address).status_code == 200
    inside = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in inside if not path.is_relative_to(scratch)] == []
    with CLIENT.stream("GET", f"{address}/gradio_api/heartbeat/abc"):  # a page that stays open
        began = time.monotonic()
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
        assert time.monotonic() - began < 10
    assert (started.returncode, out, err) == (128 + signal.SIGINT, "", "stopped\n")
    assert list(scratch.iterdir()) == []


def test_a_password_is_asked_of_page_and_api_alike(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WRONG_PASSWORD_SECONDS", 0.01)
    paths = ("/", "/healthz", "/docs", "/search?text=cell", "/image/0", "/gradio_api/queue/data", "/theme.css")
    with served.server(index, Where(port=0, password="correct horse")) as address:  # noqa: S106
        for path in paths:
            assert CLIENT.get(address + path).status_code == 401
            assert CLIENT.get(address + path, auth=("me", "wrong horse")).status_code == 401
        right = [CLIENT.get(address + path, auth=("me", "correct horse")).status_code for path in paths[:4]]
        assert right == [200] * 4
        assert CLIENT.get(address, headers={"host": "pathology.example"}, auth=("", "correct horse")).status_code == 200


def test_another_site_cannot_ask_by_a_name_of_its_own(address: str, index: Index) -> None:
    assert CLIENT.get(f"{address}/healthz", headers={"host": "evil.example"}).status_code == 421
    given = {"headers": {"origin": "https://evil.example"}, "data": {"texts": "a"}}
    assert CLIENT.post(f"{address}/embed", **given).status_code == 403  # type: ignore[arg-type]
    with served.server(index, Where("0.0.0.0", 0, public=True)) as public:  # noqa: S104
        own = {"host": socket.gethostname()}
        assert CLIENT.get(f"{public}/healthz", headers=own).status_code == 200
        assert CLIENT.get(f"{public}/healthz", headers={"host": "evil.example"}).status_code == 421


def test_a_fault_of_ours_has_its_traceback_and_tells_the_asker_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(_: bytes) -> None:
        raise ZeroDivisionError("on /secret/place")

    monkeypatch.setattr(desk, "decode", wrong)
    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)
    answer = httpx.post(f"{address}/picture", content=b"x", timeout=60)
    until = time.monotonic() + 60
    while "ZeroDivisionError" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)  # it is logged after it is answered
    log.removeHandler(caplog.handler)
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert "ZeroDivisionError" in caplog.text


SECRET = "the secret of this machine"  # noqa: S105


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file={file}",
        "/gradio_api/file=/proc/self/environ",
        "/gradio_api/file=/proc/self/root{file}",
        "/gradio_api/file/{file}",
        "/file={file}",
        "/gradio_api/file=..%2f..%2f..%2f..{file}",
        "/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{file}",
        "/static/../../../../../../../../..{file}",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{file}",
        "/assets//{file}",
        "/assets/%00{file}",
        "/assets/....//....//{file}",
        "/gradio_api/proxy=file://{file}",
        "/gradio_api/custom_component/1/client/component/..%2f..{file}",
        "/svelte/..%2f..%2f..{file}",
        "/gradio_api/deep_link?deep_link=..%2f..{file}",
        "/image/{file}",
        "/image/..%2f..{file}",
        "/image/1?thumb={file}",
        "/picture?path={file}",
        "/?deep_link=..%2f..{file}",
        "/pwa_icon",
        "/manifest.json",
    ],
)
def test_no_file_of_the_machine_is_served(address: str, tmp_path: Path, path: str) -> None:
    file = tmp_path / "secret.txt"
    file.write_text(SECRET)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:  # a client of libraries would tidy the path
        asked = path.format(file=file)
        raw.sendall(f"GET {asked} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    status = int(answer.split()[1])
    assert SECRET.encode() not in answer
    assert b"PATH=" not in answer
    assert status in (400, 404, 422) or path.startswith("/?")


def page_says(address: str, function: int, data: list[Any], event: Any = None) -> dict[str, Any]:
    """What Gradio answers to a browser, or to who plays one: the last message of its queue."""
    session = f"s{random.random()}"
    joined = {"data": data, "fn_index": function, "session_hash": session, "event_data": event, "trigger_id": None}
    answer = CLIENT.post(f"{address}/gradio_api/queue/join", json=joined)
    if answer.status_code != 200:
        return {"status": answer.status_code, **answer.json()}
    with CLIENT.stream("GET", f"{address}/gradio_api/queue/data?session_hash={session}") as stream:
        for line in stream.iter_lines():
            told = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if told.get("msg") in ("process_completed", "unexpected_error"):
                return dict(told)
    raise AssertionError("no answer")


def plain(keys: int) -> list[Any]:
    """What the page sends when nothing was touched: text, picture, kind, how many, weight, and the menus."""
    return ["", None, "Pictures", 24, 0.5, *["any"] * keys]


def test_who_plays_a_browser_gets_no_file_and_makes_no_request(
    address: str, index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gradio takes files that a value names for its own, and loads those that it gives an address for."""
    file = tmp_path / "secret.txt"
    file.write_text(SECRET)
    asked: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(1)
        link = f"http://127.0.0.1:{other.getsockname()[1]}/secret"
        values: list[Any] = [
            {"path": str(file), "meta": {"_type": "gradio.FileData"}},
            {"path": link, "url": link, "meta": {"_type": "gradio.FileData"}},
            {"ticket": str(file)},
            {"ticket": ["x"]},
            [1, 2],
            "x" * 10_000,
            10**400,
        ]
        usual = plain(len(index.keys))
        tried = [(function, [value] * len(usual), value) for function in (*range(5), -1, 10**9) for value in values]
        for place in range(len(usual)):
            tried += [(0, [*usual[:place], value, *usual[place + 1 :]], value) for value in values[:2]]
        for function, data, value in tried:
            told = page_says(address, function, [*data, None], {"id": value})
            assert SECRET not in json.dumps(told)
            assert told.get("status", 200) < 500
        with contextlib.suppress(TimeoutError):
            asked.append(other.accept())
    assert asked == []
    assert CLIENT.get(f"{address}/healthz").status_code == 200


def test_the_page_answers_as_the_index_does(address: str, index: Index, sample: served.Sample) -> None:
    usual = plain(len(index.keys))
    told = page_says(address, 0, [sample.entries[6]["caption"], *usual[1:]])["output"]["data"][0]
    expected = index.search(sample.entries[6]["caption"], k=24)
    assert re.findall(r'data-id="(\d+)"', told) == [str(hit.id) for hit in expected]
    assert expected[0].name == sample.entries[6]["img"]
    told = page_says(address, 2, usual, {"id": expected[0].id})["output"]["data"][0]
    assert re.findall(r'data-id="(\d+)"', told) == [str(hit.id) for hit in index.like(expected[0].id, k=24)]
    for odd in ("1", None, -1, 10**30, {"a": 1}, True):
        said = page_says(address, 2, usual, {"id": odd})["output"]["data"][0]
        assert 'class="problem"' in said or "Nothing asked yet" in said


def questions(sample: served.Sample) -> list[dict[str, Any]]:
    """Requests of every kind, each with how its answer is told right: `PARALLEL` of them."""
    asked: list[dict[str, Any]] = []
    for i in range(PARALLEL):
        entry = sample.entries[i % served.PAIRS]
        read = sample.picture(i % served.PAIRS).read_bytes()
        text = {"method": "GET", "url": "/search", "params": {"text": entry["caption"], "k": 3}}
        picture = {"method": "POST", "url": "/search", "files": {"image": read}}
        asked.append([text, picture][i % 2] | {"name": entry["img"]})
    return asked


def test_two_hundred_at_once_lose_none_and_memory_stays(address: str, sample: served.Sample) -> None:
    asked = questions(sample)
    start = threading.Barrier(PARALLEL)

    def ask(one: dict[str, Any]) -> str:
        given = {key: value for key, value in one.items() if key not in ("name", "url")}
        # a client each: one pool of connections for 200 threads once closed a socket that another was reading from
        with httpx.Client(timeout=120, verify=False) as client:  # noqa: S501 - there is no certificate on loopback
            start.wait()
            found = client.request(url=address + one["url"], **given)
            assert found.status_code == 200, found.text
            hits = found.json()["hits"]
            assert client.get(f"{address}{hits[0]['url']}?thumb").content[:2] == b"\xff\xd8"
        return str(hits[0]["name"])

    used = []
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in range(3):
            assert list(pool.map(ask, asked)) == [one["name"] for one in asked]
            used.append(psutil.Process().memory_info().rss)
    assert used[-1] - used[0] < 30e6, used
