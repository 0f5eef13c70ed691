"""The HTTP API: what the page does, and embeddings, for programs. It describes itself at /openapi.json and /docs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import fastapi
from fastapi import Body, File, Form, Path, Query, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, Field

from cytoclip import __version__, desk, pages
from cytoclip.desk import Desk
from cytoclip.errors import UserError
from cytoclip.search import Hit, Kind, filters

PATHS = re.compile(r"/(healthz|docs|openapi\.json|search|embed|score|picture|(similar|image)/-?[0-9]{1,20})")
BODIES = {  # the form's own lines beside the pictures
    "/picture": desk.UPLOAD_BYTES,
    "/search": desk.UPLOAD_BYTES + 100_000,
    "/score": desk.UPLOAD_BYTES + 1_000_000,
    "/embed": 64_000_000,
}
_LARGEST_ID = 2**63 - 1


class Problem(BaseModel):
    """What is wrong, and what to do about it."""

    error: str
    hint: str


class Found(BaseModel):
    """One hit; `score` is the cosine, `url` where its picture is."""

    rank: int
    score: float
    id: int
    name: str
    caption: str | None
    keys: dict[str, str]
    url: str


class Hits(BaseModel):
    """The nearest, best first."""

    hits: list[Found]


class Likelihood(BaseModel):
    """One caption; `score` is the cosine."""

    caption: str
    score: float
    probability: float


class Scores(BaseModel):
    """In the order of the captions. Probabilities sum to 1 over them, unless each is `independent` of the others."""

    independent: bool
    captions: list[Likelihood]


class Embedded(BaseModel):
    """Unit vectors; `digest` names the weights and preparation that made them."""

    model: str
    digest: str
    width: int
    images: list[list[float]]
    texts: list[list[float]]


class Health(BaseModel):
    """The server answers, and with what."""

    status: str
    version: str
    model: str
    digest: str
    width: int
    size: int = Field(description="pairs in the index")
    keys: dict[str, list[str]] = Field(description="what can be filtered by, with its commonest values")


class Ticket(BaseModel):
    """A picture that the page holds for its next questions."""

    ticket: str
    width: int
    height: int
    preview: str


Text = Annotated[str, Field(max_length=desk.TEXT)]
Where = Annotated[
    list[Annotated[str, Field(max_length=500)]], Field(max_length=20, description="`key=value`, may be repeated")
]
Count = Annotated[int, Field(ge=1, le=desk.HITS, description="how many hits")]
Weight = Annotated[
    float, Field(ge=0, le=1, allow_inf_nan=False, description="of the picture, where there is a text too")
]
Row = Annotated[int, Path(ge=0, le=_LARGEST_ID, description="of a hit")]
Flag = Annotated[bool, BeforeValidator(lambda given: True if given == "" else given)]  # `?thumb` alone says yes

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": why}
    for status, why in {
        400: "The body cannot be read",
        401: "A password is needed, by HTTP basic authentication",
        403: "A page of another site asks",
        404: "Nothing has this number",
        408: "The body did not come in time",
        413: "The body is too large",
        421: "The server has another name",
        422: "Something that was given cannot be used",
        503: "Too many wait already, or no memory is left",
    }.items()
}


def application(at: Desk) -> fastapi.FastAPI:
    """The API of a desk, without anything in front of it."""
    app = fastapi.FastAPI(
        title="cytoclip",
        version=__version__,
        summary="Search an index of pictures by text and picture, score captions, embed.",
        docs_url=None,  # those pages are loaded from a CDN
        redoc_url=None,
        responses=_PROBLEMS,
    )
    _answer_problems(app)
    _search_routes(app, at)
    _model_routes(app, at)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def described() -> str:
        return pages.render("api_page.html", document=app.openapi(), operations=_operations(app.openapi()))

    return app


def _search_routes(app: fastapi.FastAPI, at: Desk) -> None:
    @app.get("/search")
    def search_by_text(
        text: Annotated[Text, Query(min_length=1)],
        k: Annotated[Count, Query()] = 10,
        kind: Annotated[Kind, Query()] = "images",
        where: Annotated[Where, Query()] = [],  # noqa: B006 - FastAPI copies it
    ) -> Hits:
        """The nearest pictures, or captions, to a text."""
        return _hits(at.search(text, None, k, kind=kind, where=filters(where, "where")))

    @app.post("/search")
    def search(
        text: Annotated[Text | None, Form()] = None,
        image: Annotated[UploadFile | None, File(description="a picture")] = None,
        weight: Annotated[Weight, Form()] = 0.5,
        k: Annotated[Count, Form()] = 10,
        kind: Annotated[Kind, Form()] = "images",
        where: Annotated[Where, Form()] = [],  # noqa: B006
    ) -> Hits:
        """The nearest to a picture, to a text, or to both."""
        return _hits(at.search(text, image.file.read() if image else None, k, weight, kind, filters(where, "where")))

    @app.get("/similar/{id}")
    def similar(
        row: Annotated[Row, Path(alias="id")],
        k: Annotated[Count, Query()] = 10,
        where: Annotated[Where, Query()] = [],  # noqa: B006
    ) -> Hits:
        """The nearest pictures to one of the index."""
        return _hits(at.like(row, k, filters(where, "where")))

    @app.get("/image/{id}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    def image(row: Annotated[Row, Path(alias="id")], thumb: Annotated[Flag, Query()] = False) -> Response:
        """A picture of the index as JPEG, at most 2048 pixels long; with `?thumb` at most 256."""
        return Response(
            at.image(row, thumb), media_type="image/jpeg", headers={"cache-control": "private, max-age=600"}
        )

    @app.post("/picture", include_in_schema=False)  # the page's own
    def take(picture: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Ticket:
        taken = at.take(picture)
        return Ticket(
            ticket=taken.ticket, width=taken.width, height=taken.height, preview=pages.data_uri(taken.preview)
        )


def _model_routes(app: fastapi.FastAPI, at: Desk) -> None:
    @app.post("/score")
    def score(
        image: Annotated[UploadFile, File(description="a picture")],
        captions: Annotated[list[Text], Form(min_length=1, max_length=desk.CAPTIONS)],
    ) -> Scores:
        """How well each caption fits a picture (zero-shot classification)."""
        scored = at.score(image.file.read(), captions)
        told = [Likelihood(caption=one.caption, score=one.score, probability=one.probability) for one in scored]
        return Scores(independent=at.index.encoder.logit_bias is not None, captions=told)

    @app.post("/embed")
    def embed(
        images: Annotated[list[UploadFile], File(max_length=desk.BATCH_PICTURES, description="pictures")] = [],  # noqa: B006
        texts: Annotated[list[Text], Form(max_length=desk.BATCH_TEXTS)] = [],  # noqa: B006
    ) -> Embedded:
        """Unit embeddings of pictures and texts, in the order given."""
        if not images and not texts:
            raise UserError("there is nothing to embed", "give images, texts, or both")
        image_ND, text_MD = at.embed([one.file.read() for one in images], texts)
        return Embedded(**at.model(), images=image_ND.tolist(), texts=text_MD.tolist())

    @app.get("/healthz")
    def health() -> Health:
        """Whether the server answers, and what it has."""
        keys = {key: list(values) for key, values in at.index.keys.items()}
        return Health(status="ok", version=__version__, **at.model(), size=len(at.index), keys=keys)


def _hits(hits: Sequence[Hit]) -> Hits:
    return Hits(
        hits=[
            Found(
                rank=hit.rank,
                score=hit.score,
                id=hit.id,
                name=hit.name,
                caption=hit.caption,
                keys=dict(hit.keys),
                url=f"/image/{hit.id}",
            )
            for hit in hits
        ]
    )


def _answer_problems(app: fastapi.FastAPI) -> None:
    """Every failure as a `Problem`."""

    @app.exception_handler(UserError)
    def theirs(_: fastapi.Request, error: UserError) -> Response:
        return _problem(404 if isinstance(error, desk.UnknownRow) else 422, error.message, error.hint)

    @app.exception_handler(RequestValidationError)
    def invalid(_: fastapi.Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return _problem(422, f"{place}: {first['msg']}", "/docs says what is taken")

    @app.exception_handler(400)
    @app.exception_handler(404)
    @app.exception_handler(405)
    def refused(_: fastapi.Request, error: fastapi.HTTPException) -> Response:
        return _problem(error.status_code, str(error.detail), "/docs says what is taken", dict(error.headers or {}))

    @app.exception_handler(MemoryError)
    def no_memory(_: fastapi.Request, __: MemoryError) -> Response:
        return _problem(503, "no memory is left for this", "send a smaller picture, or ask again in a moment")


def _problem(status: int, error: str, hint: str, headers: dict[str, str] | None = None) -> Response:
    one_line = {"error": " ".join(error.split()), "hint": " ".join(hint.split())}
    return JSONResponse(one_line, status, headers=headers)


def _operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page of the API shows of each operation: its inputs with type, default and bounds, and its answer."""
    schemas = document["components"]["schemas"]
    found = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            inputs = [
                _input(
                    one["name"], one["in"], one["schema"] | {"description": one.get("description", "")}, one["required"]
                )
                for one in operation.get("parameters", [])
            ]
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                form = schemas[content["schema"]["$ref"].rpartition("/")[2]]
                needed = form.get("required", [])
                inputs += [_input(name, kind, schema, name in needed) for name, schema in form["properties"].items()]
            answer = operation["responses"]["200"].get("content", {})
            found.append(
                {"path": path, "method": method.upper(), "inputs": inputs, "answer": _answer(answer), **operation}
            )
    return found


def _input(name: str, place: str, schema: dict[str, Any], needed: bool) -> dict[str, Any]:
    kinds = [schema, *schema.get("anyOf", []), schema.get("items", {})]
    bounds = [f"{words} {kind[key]}" for kind in kinds for key, words in _BOUNDS.items() if key in kind]
    kind = next((one["type"] for one in kinds if "type" in one), "")
    of = schema.get("items", {}).get("type", kind)
    file = any("contentMediaType" in one or one.get("format") == "binary" for one in kinds)
    return {
        "name": name,
        "in": place.removeprefix("application/").partition("/")[0],
        "kind": f"{'list of ' if kind == 'array' else ''}{'file' if file else of}",
        "needed": needed,
        "default": schema.get("default"),
        "about": schema.get("description", ""),
        "bounds": ", ".join(bounds),
    }


_BOUNDS = {"minimum": "from", "maximum": "to", "maxItems": "at most", "maxLength": "characters, at most", "enum": "of"}


def _answer(content: dict[str, Any]) -> str:
    for kind, shown in content.items():
        return str(shown.get("schema", {}).get("$ref", "")).rpartition("/")[2] or kind
    return ""
