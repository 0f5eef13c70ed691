"""The page: Gradio's inputs around results that are our own HTML, so that every picture is reached by the keyboard.

What the data say reaches the browser as escaped HTML in a value, never in a template: Gradio compiles templates, and
runs what looks like code in them (`${…}`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import fastapi
import gradio as gr

from cytoclip import desk, pages
from cytoclip.desk import Desk
from cytoclip.errors import ExitCode, UserError, counted
from cytoclip.search import Hit, Kind

FILTERS = 8  # keys that have a menu; the API takes all of them
SHOWN = (12, 24, 48, 96)
ANY = "any"
_KINDS: dict[str, Kind] = {"Pictures": "images", "Captions": "captions"}
_QUEUE = 500  # questions that wait
_AT_ONCE = 8
_SESSIONS = 200  # that are remembered; Gradio keeps 150 kB for each, and all that we keep is what was chosen last


def mount(app: fastapi.FastAPI, at: Desk) -> None:
    """Put the page of a desk at the root of its API."""
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**62)  # else it sums up all questions so far at each one
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    blocks = _page(at)
    blocks.state_session_capacity = _SESSIONS
    blocks.queue(max_size=_QUEUE, default_concurrency_limit=_AT_ONCE, api_open=False)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,  # it would keep every question in the browser
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=_theme(),
        css=_part("search_page.css"),
        head='<meta name="color-scheme" content="light dark">',
    )


def _theme() -> gr.themes.Base:
    """Fonts of the machine, none from the web; colours that pass WCAG AA where Gradio's own do not."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="md", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    both = {
        "body_text_color_subdued": ("*neutral_600", "*neutral_300"),
        "block_label_text_color": ("*neutral_700", "*neutral_200"),
        "block_title_text_color": ("*neutral_700", "*neutral_200"),
        "input_placeholder_color": ("*neutral_600", "*neutral_300"),
        "button_primary_background_fill": ("*primary_700", "*primary_700"),
        "button_primary_background_fill_hover": ("*primary_800", "*primary_800"),
        "button_primary_text_color": ("white", "white"),
        "link_text_color": ("*primary_700", "*primary_300"),
        "error_text_color": ("#b3261e", "#ff8a80"),
    }
    values = {name: light for name, (light, _) in both.items()}
    return theme.set(
        color_accent="*primary_700", **values, **{f"{name}_dark": dark for name, (_, dark) in both.items()}
    )


def _page(at: Desk) -> gr.Blocks:
    head = pages.render("search_head.html", count=len(at.index), model=at.model()["model"])
    with gr.Blocks(title="cytoclip", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(head, elem_id="head", apply_default_css=False)
        with gr.Tabs():
            with gr.Tab("Search", id="search"):
                _search_tab(at)
            with gr.Tab("Score captions", id="score"):
                _score_tab(at)
    return blocks


def _search_tab(at: Desk) -> None:
    keys = [key for key, values in at.index.keys.items() if len(values) > 1][:FILTERS]
    with gr.Row(elem_id="ask", equal_height=True):
        text = gr.Textbox(
            label="Text", placeholder="what the picture shows, in your words", scale=6, max_length=desk.TEXT,
            elem_id="text", autofocus=True, max_lines=1, min_width=260,
        )  # fmt: skip
        picture = _drop_zone("query", "Picture")
        button = gr.Button("Search", variant="primary", scale=1, min_width=110, elem_id="go")
    with gr.Row(elem_id="narrow"):
        kind = gr.Dropdown(list(_KINDS), value="Pictures", label="Find", min_width=130, filterable=False)
        shown = gr.Dropdown(list(SHOWN), value=SHOWN[1], label="How many", min_width=110, filterable=False)
        menus = [gr.Dropdown([ANY, *at.index.keys[key]], value=ANY, label=key, min_width=150) for key in keys]
        weight = gr.Slider(0, 1, 0.5, step=0.05, label="Weight of the picture", min_width=220, visible=False)
    alike = gr.State(None)
    results = gr.HTML(
        pages.render("search_empty.html"), js_on_load=_part("search_results.js"), elem_id="results",
        apply_default_css=False,
    )  # fmt: skip

    def look(*given: Any) -> Any:
        return _answered(at, keys, None, *given)

    def look_again(*given: Any) -> Any:  # the menus are about what is shown
        *asked, row = given
        return _answered(at, keys, row, *asked)

    def look_alike(event: gr.EventData, *given: Any) -> Any:
        row = event._data.get("id") if isinstance(event._data, dict) else None
        return _answered(at, keys, row, *given)

    inputs, outputs = [text, picture, kind, shown, weight, *menus], [results, weight, alike]
    # A question that is asked while another is answered is put after it: Gradio would leave it out.
    quiet: dict[str, Any] = {
        "api_visibility": "private", "show_progress": "minimal", "show_progress_on": results,
        "trigger_mode": "always_last",
    }  # fmt: skip
    gr.on([text.submit, button.click, picture.change], look, inputs, outputs, **quiet)
    changes = [one.input for one in (kind, shown, *menus)]
    gr.on([*changes, weight.release], look_again, [*inputs, alike], outputs, **quiet)
    results.more(look_alike, inputs, outputs, **quiet)


def _score_tab(at: Desk) -> None:
    with gr.Row(elem_id="fit", equal_height=True):
        picture = _drop_zone("scored", "Picture")
        captions = gr.Textbox(
            label="Captions, one a line", lines=5, max_lines=20, scale=6, max_length=100_000, min_width=260,
            placeholder="a normal superficial cell\na koilocyte with a perinuclear halo", elem_id="captions",
        )  # fmt: skip
        button = gr.Button("Score", variant="primary", scale=1, min_width=110)
    results = gr.HTML(
        pages.render("scores.html", scored=None), js_on_load=_part("search_scores.js"), elem_id="scores",
        apply_default_css=False,
    )  # fmt: skip

    def score(held: Any, written: Any) -> str:
        return _said(lambda: _scores(at, held, written))

    gr.on(
        [button.click, captions.submit], score, [picture, captions], results,
        api_visibility="private", show_progress="minimal", trigger_mode="always_last",
    )  # fmt: skip


def _drop_zone(name: str, label: str) -> gr.HTML:
    """Where a picture is dropped, pasted or chosen. Its bytes go to our own route: nothing is written to a disk."""
    return gr.HTML(
        None,
        html_template=pages.render("drop_zone.html", name=name, label=label),
        js_on_load=_part("drop_zone.js"),
        limit=desk.UPLOAD_BYTES,
        elem_id=f"drop-{name}",
        elem_classes="drop-zone",
        min_height=84,
        apply_default_css=False,
    )


def _answered(at: Desk, keys: Sequence[str], row: Any, *given: Any) -> tuple[str, Any, Any]:
    """What the results show, whether the weight means something, and what the menus go on about."""
    text, held, kind, shown, weight, *menus = given
    both = gr.update(visible=bool(text and str(text).strip() and held))
    where = {key: str(value) for key, value in zip(keys, menus, strict=True) if value not in (None, "", ANY)}
    if row is not None:
        return _said(lambda: _alike(at, row, int(shown), where, _KINDS[str(kind)])), both, row
    if not held and not str(text or "").strip():
        return pages.render("search_empty.html"), both, None
    asked = (str(text or ""), held, int(shown), float(weight), _KINDS[str(kind)])
    return _said(lambda: _found(at, *asked, where)), both, None


def _found(at: Desk, text: str, held: Any, k: int, weight: float, kind: Kind, where: Mapping[str, str]) -> str:
    picture = _held(at, held) if held else None
    began = time.perf_counter()
    hits = at.search(text, picture, k, weight, kind, where)
    words = f"“{text.strip()}”" if text.strip() else ""
    asked = " and ".join([words] * bool(words) + ["the picture"] * (picture is not None))
    return _listed(hits, kind, f"nearest to {asked}", where, time.perf_counter() - began)


def _alike(at: Desk, row: Any, k: int, where: Mapping[str, str], kind: Kind) -> str:
    if type(row) is not int:
        raise UserError("this is no number of a picture", "take a button below a picture", ExitCode.DATA)
    began = time.perf_counter()
    hits = at.like(row, k, where, kind)
    what = "most like" if kind == "images" else "nearest to"
    return _listed(hits, kind, what, where, time.perf_counter() - began, chosen=row)


def _listed(hits: Sequence[Hit], kind: Kind, what: str, where: Mapping[str, str], seconds: float, **values: Any) -> str:
    among = f" of {', '.join(f'{key} {value}' for key, value in where.items())}" if where else ""
    one = "picture" if kind == "images" else "caption"
    said = f"{counted(len(hits), one)}{among} {what}"
    values = {"chosen": None, **values}
    return pages.render("search_hits.html", hits=hits, kind=kind, said=said, ms=round(seconds * 1000), **values)


def _scores(at: Desk, held: Any, written: Any) -> str:
    captions = list(dict.fromkeys(line.strip() for line in str(written or "").splitlines() if line.strip()))
    if not held:
        raise UserError("there is no picture to score", "drop one", ExitCode.DATA)
    if len(captions) > desk.CAPTIONS or max(map(len, captions), default=0) > desk.TEXT:
        raise UserError("these are too many captions, or too long ones", f"at most {desk.CAPTIONS}", ExitCode.DATA)
    scored = sorted(at.score(_held(at, held), captions), key=lambda one: -one.probability)
    return pages.render("scores.html", scored=scored, independent=at.index.encoder.logit_bias is not None)


def _held(at: Desk, held: Any) -> bytes:
    """The picture that the drop zone's value stands for, whatever a browser sent as one."""
    ticket = held.get("ticket") if isinstance(held, dict) else None
    return at.held(str(ticket))


def _said(work: Any) -> str:
    """What `work` renders, or what was wrong."""
    try:
        return str(work())
    except UserError as error:
        return pages.render("search_problem.html", error=error.message, hint=error.hint)
    except MemoryError:
        return pages.render("search_problem.html", error="no memory is left for this", hint="ask again in a moment")


def _part(name: str) -> str:
    return resources.files("cytoclip").joinpath(name).read_text(encoding="utf-8")
