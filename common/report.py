"""Results as one self-contained HTML page with pictures, figures and tables."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.checks import UserError, require_file
from common.files import plain, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture: TypeAlias = Union[str, os.PathLike[str], Image.Image, np.ndarray, "Figure"]
"""A file (inlined as it is), a PIL image, an array (h, w, 3 or 4) or (h, w), uint8 or float in [0, 1], a figure, or
what `data_uri` or `thumbnail` gave."""

MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}


RIGHT = ' class="number"'


def contact_sheet(
    images: Sequence[Image.Image | np.ndarray], captions: Sequence[str] = (), *, columns: int = 4, size: int = 192
) -> Image.Image:
    """One picture of many, each fitted into a `size`-pixel square above its caption."""
    if not images:
        raise UserError("contact sheet has 0 images: give at least 1.")
    if captions and len(captions) != len(images):
        raise UserError(f"contact sheet has {len(images)} images but {len(captions)} captions: give one for each.")
    columns = min(columns, len(images))
    gap, font = 8, ImageFont.load_default(13)
    lines = [_wrap(caption, font, size) for caption in captions] or [[] for _ in images]
    text_height = 17 * max(map(len, lines))
    rows = math.ceil(len(images) / columns)
    cell_width, cell_height = size + gap, size + text_height + gap
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = gap + index % columns * cell_width, gap + index // columns * cell_height
        picture = _to_pil(image).convert("RGB")
        scale = min(size / picture.width, size / picture.height)
        fitted = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        sheet.paste(fitted, (x + (size - fitted.width) // 2, y + (size - fitted.height) // 2))
        for row, line in enumerate(lines[index]):
            draw.text((x, y + size + 2 + 17 * row), line, fill="black", font=font)
    return sheet


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Words of `text` in lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _to_pil(picture: Image.Image | np.ndarray) -> Image.Image:
    """A PIL image from one, or from an array."""
    if isinstance(picture, Image.Image):
        return picture
    array = np.asarray(picture)
    if array.dtype != np.uint8:
        array = (np.nan_to_num(array.astype(np.float64)).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(array)


def data_uri(picture: Picture) -> str:
    """`picture` as a data: URI.

    Raises:
        UserError: a file that is missing or of a kind that browsers do not show.
    """
    if isinstance(picture, str) and picture.startswith("data:"):
        return picture
    if isinstance(picture, (str, os.PathLike)):
        path = require_file(picture, "picture")
        if path.suffix.lower() not in MEDIA_TYPES:
            raise UserError(f"picture {str(path)!r} is no {', '.join(MEDIA_TYPES)} file: convert it first.")
        media, content = MEDIA_TYPES[path.suffix.lower()], path.read_bytes()
    elif hasattr(picture, "savefig"):
        from matplotlib import rc_context

        buffer = io.StringIO()
        with rc_context({"svg.hashsalt": "page"}):  # the same figure gives the same bytes
            picture.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        media, content = "image/svg+xml", buffer.getvalue().encode()
    else:
        image, packed = _to_pil(picture), io.BytesIO()
        if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
            image = image.convert("RGB")
        # Photographs are many times larger as PNG, small renders and drawings need its exact pixels.
        if image.mode == "RGB" and image.width * image.height > 512 * 512:
            image.save(packed, "JPEG", quality=90)
            media = "image/jpeg"
        else:
            image.save(packed, "PNG", optimize=True)
            media = "image/png"
        content = packed.getvalue()
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: Image.Image, size: int = 320) -> str:
    """A JPEG of at most `size` pixels a side, as a data: URI, for pages of many photographs."""
    small = image.convert("RGB")
    small.thumbnail((size, size))
    packed = io.BytesIO()
    small.save(packed, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"


def plot_lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str, log_x: bool = False
) -> Figure:
    """A figure of named curves, each (xs, ys), in the page's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, label=name, linewidth=1.8)
    _style(axes, x, y)
    if log_x:
        axes.set_xscale("log")
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def plot_bars(values: Mapping[str, float], *, x: str = "", errors: Mapping[str, float] | None = None) -> Figure:
    """A figure of named horizontal bars with their values, the first on top."""
    from matplotlib.figure import Figure

    names = list(values)
    figure = Figure(figsize=(7, 0.7 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    spread = [(errors or {}).get(name, 0.0) for name in names] if errors else None
    bars = axes.barh(range(len(names)), [values[name] for name in names], xerr=spread, color="#3b6fd4", height=0.62)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.bar_label(bars, labels=[_number(values[name]) for name in names], padding=4, fontsize=9)
    axes.margins(x=0.12)
    _style(axes, x, "")
    return figure


def _style(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _number(value: Any) -> str:
    """A table's cell: three significant decimals, thousands separated, a dash for what is missing."""
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if not math.isfinite(number):
            return "∞" if number > 0 else "−∞"
        size = abs(number)
        return f"{number:,.0f}" if size >= 1000 else f"{number:.3g}" if 0 < size < 0.001 else f"{number:.3f}"
    return str(value)


class Page:
    """One HTML page that needs nothing beside itself: no link, every picture within; a script only to sort galleries.

    The parts appear in the order of the calls, which return the page. Every text given is shown as it is: what
    looks like HTML is escaped.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._sections: list[str] = []
        self._sortable = False

    def section(self, heading: str, text: str = "") -> Page:
        """Begin a section, with an introduction."""
        self._sections.append(heading)
        self._parts.append(f'<h2 id="s{len(self._sections)}">{_escape(heading)}</h2>')
        return self.text(text) if text else self

    def text(self, text: str) -> Page:
        """Paragraphs, separated by an empty line; `words between backticks` are code."""
        for paragraph in filter(None, (part.strip() for part in text.split("\n\n"))):
            self._parts.append(f"<p>{_inline(paragraph)}</p>")
        return self

    def note(self, text: str) -> Page:
        """A paragraph set apart: a limit, a warning, how to read what follows."""
        self._parts.append(f'<p class="note">{_inline(text)}</p>')
        return self

    def command(self, command: str) -> Page:
        """The command that made the numbers beside it."""
        self._parts.append(f'<pre class="command"><code>{_escape(command.strip())}</code></pre>')
        return self

    def table(
        self,
        rows: Sequence[Mapping[str, Any] | Sequence[Any]],
        columns: Sequence[str] | None = None,
        caption: str = "",
    ) -> Page:
        """A table of dicts, or of sequences as long as `columns`; numbers are rounded and set to the right.

        Args:
            rows: of the table; a key that a dict lacks leaves its cell at a dash.
            columns: headings and their order; all keys of the dicts where left out.
        """
        if columns is None:
            mappings = [row for row in rows if isinstance(row, Mapping)]
            columns = list(dict.fromkeys(key for row in mappings for key in row))
        body, numeric = [], [bool(rows)] * len(columns)
        for row in rows:
            if not isinstance(row, Mapping) and len(row) != len(columns):
                raise ValueError(f"table row {row!r} has {len(row)} cells: give {len(columns)}, one for each column.")
            cells = [row.get(column) for column in columns] if isinstance(row, Mapping) else list(row)
            body.append("<tr>" + "".join(_cell(cell, first=not i) for i, cell in enumerate(cells)) + "</tr>")
            numeric = [known and _is_number(cell) for known, cell in zip(numeric, cells, strict=True)]
        head = "".join(
            f'<th scope="col"{number * RIGHT}>{_escape(column)}</th>'
            for column, number in zip(columns, numeric, strict=True)
        )
        title = f"<caption>{_inline(caption)}</caption>" if caption else ""
        rest = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        self._parts.append(f'<div class="wide"><table>{title}{rest}</table></div>')
        return self

    def image(self, picture: Picture, caption: str = "", *, alt: str = "", pixelated: bool = False) -> Page:
        """A picture or figure; `alt` is for who cannot see it, the caption where left out.

        `pixelated` shows the exact pixels of a small picture, without smoothing.
        """
        self._parts.append(
            f"<figure>{_img(picture, alt or caption or 'picture', pixelated)}{_figcaption(caption)}</figure>"
        )
        return self

    def figure(self, figure: Figure, caption: str = "", *, alt: str = "") -> Page:
        """A matplotlib figure, as a drawing that stays sharp."""
        return self.image(figure, caption, alt=alt)

    def gallery(
        self,
        cards: Sequence[tuple[Picture, str, Sequence[str]]],
        *,
        width: int = 190,
        pixelated: bool = False,
        whole: bool = False,
        scores: Sequence[Mapping[str, float]] = (),
    ) -> Page:
        """Cards of (picture, title, lines) in as many columns, at least `width` pixels wide, as there is room for.

        Pictures are cropped to squares unless `whole` is set. Titles and lines are captions and names, so a backtick in
        them is one. With `scores`, by name for each card, the cards show them, and the reader sorts by any, best or
        worst first.
        """
        if scores and len(scores) != len(cards):
            raise ValueError(f"gallery has {len(cards)} cards but {len(scores)} scores: give one for each.")
        shown = []
        for number, (picture, title, lines) in enumerate(cards):
            body = "".join(f"<p>{_escape(line)}</p>" for line in lines)
            head = f"<h3>{_escape(title)}</h3>" if title else ""
            alt = title or (lines[0] if lines else "picture")
            mark = ""
            if scores:
                mark = f' data-scores="{_escape(json.dumps(plain(scores[number])))}"'
                body += f'<p class="scores">{_escape(_score_line(scores[number]))}</p>'
            shown.append(f'<article class="card"{mark}>{_img(picture, alt, pixelated)}{head}{body}</article>')
        kind = "gallery whole" if whole else "gallery"
        gallery = f'<div class="{kind}" style="--card:{int(width)}px">{"".join(shown)}</div>'
        if scores:
            names = list(dict.fromkeys(name for row in scores for name in row))
            choices = "".join(f"<option>{_escape(name)}</option>" for name in names)
            buttons = "".join(
                f'<button type="button" data-order="{order}" aria-pressed="{str(order == "given").lower()}">{label}'
                f"</button>"
                for order, label in (("best", "best first"), ("worst", "worst first"), ("given", "as in the data"))
            )
            label = f"<label>sort by <select>{choices}</select></label>"
            gallery = f'<div class="sortable"><div class="sorting">{label}{buttons}</div>{gallery}</div>'
            self._sortable = True
        self._parts.append(gallery)
        return self

    def video(self, path: str | os.PathLike[str], caption: str = "", *, alt: str = "") -> Page:
        """A GIF, MP4 or WebM file, playing without sound over and over."""
        if Path(path).suffix.lower() not in (".mp4", ".webm"):
            return self.image(path, caption, alt=alt)
        label = html.escape(alt or caption or "video", quote=True)
        self._parts.append(
            f'<figure><video src="{data_uri(path)}" aria-label="{label}" controls loop muted playsinline autoplay>'
            f"</video>{_figcaption(caption)}</figure>"
        )
        return self

    def details(self, summary: str, obj: Any) -> Page:
        """Something long that opens on a click: text, or a value shown as JSON (a configuration, versions)."""
        body = obj if isinstance(obj, str) else json.dumps(plain(obj), indent=1, ensure_ascii=False)
        self._parts.append(
            f"<details><summary>{_inline(summary)}</summary><pre><code>{_escape(body)}</code></pre></details>"
        )
        return self

    def html(self) -> str:
        """The whole page."""
        links = "".join(
            f'<a href="#s{number}">{_escape(heading)}</a>' for number, heading in enumerate(self._sections, start=1)
        )
        navigation = f'<nav aria-label="sections">{links}</nav>' if len(self._sections) > 2 else ""
        subtitle = f'<p class="subtitle">{_inline(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f"<title>{_escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f"<header><h1>{_escape(self.title)}</h1>{subtitle}{navigation}</header>\n<main>\n"
            + "\n".join(self._parts)
            + "\n</main>\n"
            + (f"<script>{SORTING}</script>\n" if self._sortable else "")
            + "</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to `path`, all at once."""
        return write_text(path, self.html())


def _escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def _inline(text: Any) -> str:
    """Escaped text in which `words between backticks` are code."""
    pieces = _escape(text).split("`")
    if len(pieces) % 2 == 0:  # a backtick without its partner stays as it is
        pieces[-2:] = ["`".join(pieces[-2:])]
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _score_line(scores: Mapping[str, float]) -> str:
    return "  ·  ".join(f"{name} {_number(value)}" for name, value in scores.items())


def _figcaption(caption: str) -> str:
    return f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""


def _is_number(value: Any) -> bool:
    """Whether a cell is set to the right; what is missing among numbers is too."""
    return value is None or (isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool))


def _cell(value: Any, *, first: bool) -> str:
    shown = _inline(_number(value))
    if first and not _is_number(value):
        return f'<th scope="row">{shown}</th>'
    return f"<td{_is_number(value) * RIGHT}>{shown}</td>"


def _img(picture: Picture, alt: str, pixelated: bool = False) -> str:
    kinds = [name for name, on in (("drawing", hasattr(picture, "savefig")), ("pixelated", pixelated)) if on]
    mark = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<img src="{data_uri(picture)}" alt="{_escape(alt)}" loading="lazy"{mark}>'


# Cards without the chosen score come last, whichever way they are sorted; equal ones keep the data's order.
SORTING = """
for (const part of document.querySelectorAll(".sortable")) {
  const gallery = part.querySelector(".gallery"), choice = part.querySelector("select");
  const buttons = [...part.querySelectorAll("button")], given = [...gallery.children];
  const scores = new Map(given.map((card) => [card, JSON.parse(card.dataset.scores)]));
  let order = "given";
  const show = () => {
    const sign = order === "best" ? -1 : 1, name = choice.value;
    const known = given.filter((card) => typeof scores.get(card)[name] === "number");
    if (order !== "given") known.sort((a, b) => sign * (scores.get(a)[name] - scores.get(b)[name]));
    const rest = given.filter((card) => typeof scores.get(card)[name] !== "number");
    gallery.replaceChildren(...(order === "given" ? given : [...known, ...rest]));
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.order === order));
  };
  choice.addEventListener("change", show);
  for (const button of buttons) button.addEventListener("click", () => { order = button.dataset.order; show(); });
}
"""

STYLE = """
:root { --ink: #1c2230; --soft: #5b6474; --paper: #fcfcfd; --panel: #ffffff; --line: #e1e5ec; --tint: #f2f5fa;
  --accent: #2456c5; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #9ba5b7; --paper: #12151c; --panel: #1a1f29;
  --line: #2e3543; --tint: #202632; --accent: #8ab0ff; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.6; font-size: 1.0625rem;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3rem; }
main { padding-bottom: 4rem; }
h1 { font-size: clamp(1.8rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .6rem;
  text-wrap: balance; }
h2 { font-size: 1.5rem; line-height: 1.25; letter-spacing: -.01em; margin: 3.2rem 0 .8rem; padding-top: 1.6rem;
  border-top: 1px solid var(--line); scroll-margin-top: 1rem; text-wrap: balance; }
h3 { font-size: 1rem; line-height: 1.35; margin: .65rem .8rem .2rem; overflow-wrap: anywhere; }
p { margin: 0 0 1rem; max-width: 44rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
.subtitle { color: var(--soft); font-size: 1.15rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: 1.2rem; }
nav a { text-decoration: none; font-size: .9rem; padding: .25rem .75rem; border: 1px solid var(--line);
  border-radius: 99px; background: var(--panel); }
nav a:hover, nav a:focus-visible { border-color: var(--accent); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .88em; }
p code, td code, th code { background: var(--tint); border-radius: 4px; padding: .1em .3em; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  margin: 0 0 1.2rem; overflow-x: auto; line-height: 1.5; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
pre.command code::before { content: "$ "; color: var(--soft); user-select: none; }
.note { border-left: 3px solid var(--accent); background: var(--tint); padding: .7rem 1rem;
  border-radius: 0 8px 8px 0; }
.wide { overflow-x: auto; margin: 0 0 1.5rem; border: 1px solid var(--line); border-radius: 10px;
  background: var(--panel); }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: .9rem; padding: .6rem .9rem;
  border-top: 1px solid var(--line); }
th, td { padding: .5rem .9rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .85rem; vertical-align: bottom; }
tbody th { font-weight: 600; }
td { max-width: 36rem; overflow-wrap: break-word; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0 0 1.5rem; }
figure img, figure video { max-width: 100%; height: auto; border-radius: 10px; display: block; }
img.drawing { background: #fff; padding: .6rem; border: 1px solid var(--line); }
img.pixelated { image-rendering: pixelated; min-width: min(100%, 16rem); }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; max-width: 44rem; }
.gallery { display: grid; gap: 1rem; margin: 0 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--card), 100%), 1fr)); }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
  padding-bottom: .5rem; }
.card img { width: 100%; display: block; aspect-ratio: 1; object-fit: cover; background: var(--tint); }
.card img.drawing { object-fit: contain; }
.whole .card img { aspect-ratio: auto; }
.card p { margin: .25rem .8rem .35rem; font-size: .9rem; line-height: 1.45; color: var(--soft); }
.card h3 + p { margin-top: 0; }
.card p.scores { font-size: .78rem; font-variant-numeric: tabular-nums; border-top: 1px solid var(--line);
  padding-top: .35rem; white-space: pre-wrap; }
.sorting { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin: 0 0 1rem; font-size: .92rem; }
.sorting select, .sorting button { font: inherit; color: inherit; background: var(--panel); cursor: pointer;
  border: 1px solid var(--line); border-radius: 8px; padding: .3rem .7rem; }
.sorting button[aria-pressed="true"] { border-color: var(--accent); color: var(--accent); font-weight: 600; }
details { border: 1px solid var(--line); border-radius: 10px; padding: .6rem 1rem; margin: 0 0 1.2rem;
  background: var(--panel); }
summary { cursor: pointer; font-weight: 600; }
details pre { margin: .8rem 0 .3rem; max-height: 30rem; overflow: auto; }
@media (max-width: 480px) { body { font-size: 1rem; } header { padding-top: 1.8rem; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(min(calc(var(--card) * .75), 100%), 1fr)); gap: .7rem; }
  th, td { padding: .4rem .6rem; } h2 { margin-top: 2.2rem; } }
@media print { body { background: #fff; } .card, figure, .wide { break-inside: avoid; } nav { display: none; } }
"""
