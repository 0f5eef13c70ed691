"""The API as programs meet it: answers as the index gives them, refusals in one shape, and no 500 whatever comes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from cytoclip import api, desk, guard
from cytoclip.desk import Desk
from cytoclip.guard import Rules
from cytoclip.search import Hit, Index
from tests import served

WRONG = GenerationMode.NEGATIVE
FORM = {"content-type": "multipart/form-data; boundary=x"}
OPERATIONS = [
    ("get", "/search"), ("post", "/search"), ("get", "/similar/{id}"), ("get", "/image/{id}"), ("post", "/score"),
    ("post", "/embed"), ("get", "/healthz"),
]  # fmt: skip


@pytest.fixture(scope="module")
def at(sample: served.Sample) -> Desk:
    return Desk(Index.open(sample.index))


@pytest.fixture(scope="module")
def app(at: Desk) -> Any:
    return guard.guarded(api.application(at), Rules(None, frozenset({"testserver"}), api.BODIES, api.PATHS))


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[TestClient]:
    with TestClient(app) as made:
        yield made


def refused(answer: httpx.Response, status: int) -> dict[str, str]:
    """What a refusal says: one line each, and no more."""
    assert answer.status_code == status, answer.text
    told: dict[str, str] = answer.json()
    assert set(told) == {"error", "hint"}
    assert all(one and "\n" not in one for one in told.values())
    return told


def as_told(hits: list[Hit]) -> list[dict[str, Any]]:
    return [
        {"rank": hit.rank, "score": pytest.approx(hit.score), "id": hit.id, "name": hit.name, "caption": hit.caption,
         "keys": dict(hit.keys), "url": f"/image/{hit.id}"} for hit in hits
    ]  # fmt: skip


def test_hits_are_those_of_the_index(client: TestClient, at: Desk, sample: served.Sample) -> None:
    caption, picture = sample.entries[7]["caption"], sample.picture(8)
    found = client.get("/search", params={"text": caption, "k": 5}).json()["hits"]
    assert found == as_told(at.index.search(caption, k=5))
    assert (found[0]["name"], found[0]["caption"]) == (sample.entries[7]["img"], caption)
    given = {"text": caption, "weight": 0.7, "k": 4}
    both = client.post("/search", data=given, files={"image": picture.read_bytes()}).json()["hits"]
    assert both == as_told(at.index.search(caption, picture, weight=0.7, k=4))
    only = client.post("/search", files={"image": picture.read_bytes()}).json()["hits"]
    assert only == as_told(at.index.search(image=picture))
    assert only[0]["name"] == sample.entries[8]["img"]
    told = client.get("/search", params={"text": caption, "kind": "captions"}).json()["hits"]
    assert told == as_told(at.index.search(caption, kind="captions"))
    label, source = sample.entries[7]["label"], sample.entries[7]["source"]
    where = [f"label={label}", f"source={source}"]
    for some in (
        client.get("/search", params={"text": caption, "where": where}),
        client.post("/search", data={"text": caption, "where": where}),
        client.get(f"/similar/{found[0]['id']}", params={"where": [f"label={label}"]}),
    ):
        assert {hit["keys"]["label"] for hit in some.json()["hits"]} <= {label}
    alike = client.get(f"/similar/{found[0]['id']}", params={"k": 3}).json()["hits"]
    assert alike == as_told(at.index.like(found[0]["id"], k=3))
    assert found[0]["id"] not in [hit["id"] for hit in alike]


def test_pictures_of_hits_are_jpegs(client: TestClient, sample: served.Sample) -> None:
    found = client.get("/search", params={"text": served.HOSTILE}).json()["hits"]
    for hit in found[:3]:
        answer = client.get(hit["url"])
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(answer.content)).size == (96, 96)
        for asked in ("?thumb", "?thumb=true", "?thumb=1"):
            assert client.get(hit["url"] + asked).content[:2] == b"\xff\xd8"
    refused(client.get("/image/1?thumb=perhaps"), 422)


def test_embeddings_and_scores(client: TestClient, at: Desk, sample: served.Sample) -> None:
    captions = [entry["caption"] for entry in sample.entries[:3]]
    pictures = [sample.picture(i).read_bytes() for i in range(4)]
    answer = client.post("/embed", data={"texts": captions}, files=[("images", one) for one in pictures]).json()
    expected = at.embed(pictures, captions)
    np.testing.assert_allclose(answer["images"], expected[0], atol=1e-6)
    np.testing.assert_allclose(answer["texts"], expected[1], atol=1e-6)
    assert (answer["width"], answer["model"], answer["digest"]) == (16, "run", at.index.encoder.digest)
    assert client.post("/embed", data={"texts": "one"}).json()["images"] == []
    told = client.post("/score", data={"captions": captions}, files={"image": pictures[1]}).json()
    assert told["independent"] is False
    assert [one["caption"] for one in told["captions"]] == captions
    assert sum(one["probability"] for one in told["captions"]) == pytest.approx(1)
    assert max(told["captions"], key=lambda one: one["probability"])["caption"] == captions[1]


def test_health_says_what_is_served(client: TestClient, sample: served.Sample) -> None:
    told = client.get("/healthz").json()
    assert (told["status"], told["size"], told["model"], told["width"]) == ("ok", len(sample.entries), "run", 16)
    assert set(told["keys"]["label"]) == {entry["label"] for entry in sample.entries}
    assert "/" not in told["model"]


@pytest.mark.parametrize(
    ("method", "path", "given", "status", "said"),
    [
        ("GET", "/search", {"params": {}}, 422, "text: Field required"),
        ("GET", "/search", {"params": {"text": ""}}, 422, "text: String should have at least 1"),
        ("GET", "/search", {"params": {"text": "  "}}, 422, "there is nothing to look for"),
        ("GET", "/search", {"params": {"text": "a" * 2001}}, 422, "at most 2000 characters"),
        ("GET", "/search", {"params": {"text": "a", "k": 0}}, 422, "k: Input should be greater"),
        ("GET", "/search", {"params": {"text": "a", "k": 201}}, 422, "k: Input should be less"),
        ("GET", "/search", {"params": {"text": "a", "kind": "x"}}, 422, "kind: Input should be 'images' or 'captions'"),
        ("GET", "/search", {"params": {"text": "a", "where": "label"}}, 422, "where 'label' is not key=value"),
        ("GET", "/search", {"params": {"text": "a", "where": "labl=x"}}, 422, "labl"),
        ("GET", "/search", {"params": {"text": "<start> <end>"}}, 422, "end token"),
        ("POST", "/search", {"data": {"k": 3}}, 422, "there is nothing to look for"),
        ("POST", "/search", {"data": {"text": "a", "weight": "nan"}}, 422, "weight"),
        ("POST", "/search", {"files": {"image": b"no picture"}}, 422, "this is no picture that can be read"),
        ("POST", "/search", {"data": {"image": "words"}}, 422, "image"),
        ("POST", "/search", {"json": {"text": "a"}}, 422, "there is nothing to look for"),
        ("POST", "/score", {"files": {"image": b"x"}}, 422, "captions: Field required"),
        ("POST", "/score", {"data": {"captions": ["a"] * 101}, "files": {"image": b"x"}}, 422, "at most 100"),
        ("POST", "/embed", {}, 422, "there is nothing to embed"),
        ("POST", "/embed", {"data": {"texts": ["a"] * 257}}, 422, "at most 256"),
        ("POST", "/embed", {"files": [("images", b"x")] * 33}, 422, "at most 32"),
        ("POST", "/embed", {"files": [("images", b"x")] * 1001}, 400, "Too many files"),
        ("POST", "/picture", {"content": b"GIF89a"}, 422, "this is no picture that can be read"),
        ("POST", "/picture", {"content": b"x" * (desk.UPLOAD_BYTES + 1)}, 413, "more than 20,000,000 bytes"),
        (
            "POST",
            "/search",
            {"content": (b"x" * 1_000_000 for _ in range(30)), "headers": FORM},
            413,
            "more than 20,100,000 bytes",
        ),
        ("GET", "/similar/99999999999", {}, 404, "no picture 99999999999"),
        ("GET", "/similar/-1", {}, 422, "id"),
        ("GET", f"/similar/{2**63}", {}, 422, "id"),
        ("GET", "/image/99999999999?thumb", {}, 404, "no picture"),
        ("GET", "/image/..%2F..%2Fetc%2Fpasswd", {}, 404, "there is nothing here"),
        ("GET", "/image/1.png", {}, 404, "there is nothing here"),
        ("DELETE", "/search", {}, 405, "Method Not Allowed"),
        ("GET", "/nothing", {}, 404, "there is nothing here"),
        ("GET", "/search", {"params": {"text": "a", "where": ["label=x", "label=y"]}}, 422, "no hit is both"),
    ],
)
def test_a_refusal_is_one_line_and_a_hint(
    client: TestClient, method: str, path: str, given: dict[str, Any], status: int, said: str
) -> None:
    assert said in refused(client.request(method, path, **given), status)["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x\r\n",
        b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n\xff\xfe\xed\xa0\x80\r\n--x--\r\n',
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="\x00../../x"\r\n\r\nx\r\n--x--\r\n',
        b'--x\r\nContent-Disposition: form-data; name="text"; filename=""\r\n\r\n\r\n--x--\r\n',
        b'--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--\r\n',
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "application/json",
        "x",
        "multipart/form-data; boundary=x; charset=rot13",
    ],
)
@pytest.mark.parametrize("path", ["/search", "/score", "/embed", "/picture"])
def test_a_broken_body_is_the_askers_fault(client: TestClient, path: str, kind: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"content-type": kind})
    assert answer.status_code in (200, 400, 422), answer.text


def test_no_memory_is_told(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: bytes) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(desk, "decode", without)
    assert "no memory" in refused(client.post("/picture", content=b"x"), 503)["error"]


def test_the_pages_picture_is_held_under_a_ticket(client: TestClient, at: Desk, sample: served.Sample) -> None:
    told = client.post("/picture", content=sample.picture(0).read_bytes()).json()
    assert at.held(told["ticket"]) == sample.picture(0).read_bytes()
    kind, _, shown = told["preview"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (told["width"], told["height"]) == (96, 96)


def test_the_api_describes_itself_without_asking_anywhere(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operations = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert operations == set(OPERATIONS)
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert len(re.findall(r"<h2><code>(GET|POST) /", page.text)) == len(operations)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page.text)
    for words in ("list of file", "from 1, to 200", "at most 32", "needed", "<td>0.5</td>", "Probabilities sum to 1"):
        assert words in page.text


@pytest.fixture(scope="module")
def described(app: Any) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*one, mode) for one in OPERATIONS for mode in GenerationMode if (one[1], mode) != ("/healthz", WRONG)],
)
def test_nothing_that_comes_is_a_fault_of_the_server(
    described: Any, method: str, path: str, mode: GenerationMode
) -> None:
    """Every check of schemathesis: no 5xx, and statuses, types and shapes as the document says."""
    operation = described[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
    def every(case: Any) -> None:
        # whether a text or picture can be used depends on the index and on its bytes, which no document says
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    every()
