"""Pictures of a draft tree, as lines of text and as SVG."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_LONGEST_LABEL = 24
_GLYPH, _ROW, _BOX, _GAP, _MARGIN = 8, 44, 34, 34, 16  # SVG units


@dataclass(slots=True)
class Sketch:
    """What a picture shows; node 0 is the root."""

    labels: Sequence[str]
    notes: Sequence[str]
    """Set small behind the label; mostly a probability."""
    children: Sequence[Sequence[int]]
    accepted: Sequence[int]
    """Node numbers of a path that starts at a child of the root."""
    closing: str | None = None
    """Label of the token that closed the round."""


@dataclass(slots=True)
class _Colours:
    fill: str
    line: str
    text: str


_PLAIN = _Colours("#f6f8fa", "#c5ccd5", "#57606a")
_ACCEPTED = _Colours("#e3f4e8", "#1a7f37", "#0f5323")
_CLOSING = _Colours("#fff3dc", "#bf8700", "#7a5200")
_ROOT = _Colours("#24292f", "#24292f", "#ffffff")


class _Picture:
    """A sketch whose closing token is a node like the others, and whose labels are fit to be shown."""

    def __init__(self, sketch: Sketch) -> None:
        self.labels = [_shown(label) for label in sketch.labels]
        self.notes = list(sketch.notes)
        self.children = [list(children) for children in sketch.children]
        self.accepted = set(sketch.accepted)
        self.closing = -1
        if sketch.closing is not None:
            self.closing = len(self.labels)
            self.labels.append(_shown(sketch.closing))
            self.notes.append("")
            self.children.append([])
            self.children[sketch.accepted[-1] if sketch.accepted else 0].append(self.closing)

    def preorder(self) -> Iterator[int]:
        waiting = [0]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += self.children[node][::-1]

    def colours(self, node: int) -> _Colours:
        if node == 0:
            return _ROOT
        return _CLOSING if node == self.closing else _ACCEPTED if node in self.accepted else _PLAIN


def ascii_art(sketch: Sketch) -> str:
    """Lines of text; an accepted draft is marked with ✓, the closing token with ◆."""
    picture = _Picture(sketch)
    lines = []
    waiting = [(0, "", "")]  # first node of a run, what its line starts with, and the lines below it
    while waiting:
        node, start, below = waiting.pop()
        run = [_cell(picture, node)]
        while len(picture.children[node]) == 1:
            node = picture.children[node][0]
            run.append(_cell(picture, node))
        lines.append(start + " ─ ".join(run))
        for i, child in enumerate(reversed(picture.children[node])):
            branch, rest = ("└─ ", "   ") if i == 0 else ("├─ ", "│  ")
            waiting.append((child, below + branch, below + rest))
    return "\n".join(lines)


def svg(sketch: Sketch) -> str:
    """An SVG document: the root on the left, the accepted path in green, the closing token in amber."""
    picture = _Picture(sketch)
    x, y, widths, size = _layout(picture)
    edges, boxes = [], []
    for node in range(len(picture.labels)):
        for child in picture.children[node]:
            edges.append(_edge(picture, child, (x[node] + widths[node], y[node]), (x[child], y[child])))
        boxes.append(_box(picture, node, x[node], y[node], widths[node]))
    edges.sort(key=lambda edge: _PLAIN.line not in edge)  # the marked ones on top
    drafts = len(sketch.labels) - 1
    marked = f", {len(sketch.accepted)} accepted" if sketch.accepted or sketch.closing is not None else ""
    width, height = size
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="ui-monospace, Menlo, Consolas, monospace">',
            f"<title>Draft tree: {drafts} drafts{marked}</title>",
            f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
            '<g fill="none">',
            *edges,
            "</g>",
            '<g text-anchor="middle">',
            *boxes,
            "</g>",
            "</svg>\n",
        ]
    )


def _layout(picture: _Picture) -> tuple[list[int], list[int], list[int], tuple[int, int]]:
    """Left edge, middle and width of every box, and the size of it all."""
    count = len(picture.labels)
    widths = [
        max(_columns(label) * _GLYPH, _columns(note) * (_GLYPH - 2)) + 18
        for label, note in zip(picture.labels, picture.notes, strict=True)
    ]
    depth, y = [0] * count, [0] * count
    order = list(picture.preorder())
    leaves = 0
    for node in order:
        for child in picture.children[node]:
            depth[child] = depth[node] + 1
        if not picture.children[node]:
            y[node] = _MARGIN + _BOX // 2 + leaves * _ROW
            leaves += 1
    for node in reversed(order):
        children = picture.children[node]
        if children:
            y[node] = (y[children[0]] + y[children[-1]]) // 2
    left = [_MARGIN]
    for level in range(max(depth) + 1):
        widest = max(widths[node] for node in order if depth[node] == level)
        left.append(left[-1] + widest + _GAP)
    x = [left[level] for level in depth]
    return x, y, widths, (left[-1] - _GAP + _MARGIN, 2 * _MARGIN + _BOX + (leaves - 1) * _ROW)


def _edge(picture: _Picture, child: int, start: tuple[int, int], end: tuple[int, int]) -> str:
    marked = picture.colours(child) is not _PLAIN
    middle = (start[0] + end[0]) // 2
    curve = f"M{start[0]} {start[1]}C{middle} {start[1]} {middle} {end[1]} {end[0]} {end[1]}"
    return f'<path d="{curve}" stroke="{picture.colours(child).line}" stroke-width="{3 if marked else 1.5}"/>'


def _box(picture: _Picture, node: int, x: int, y: int, width: int) -> str:
    colours, note = picture.colours(node), picture.notes[node]
    marked = colours in (_ACCEPTED, _CLOSING)
    middle = x + width // 2
    text = (
        f'<rect x="{x}" y="{y - _BOX // 2}" width="{width}" height="{_BOX}" rx="7" fill="{colours.fill}" '
        f'stroke="{colours.line}" stroke-width="{2 if marked else 1.2}"/>'
        f'<text x="{middle}" y="{y if note else y + 5}" font-size="13" fill="{colours.text}">'
        f"{escape(picture.labels[node])}</text>"
    )
    if note:
        text += (
            f'<text x="{middle}" y="{y + 12}" font-size="10" fill="{colours.text}" fill-opacity="0.8">'
            f"{escape(note)}</text>"
        )
    return text


def _cell(picture: _Picture, node: int) -> str:
    mark = "◆" if node == picture.closing else "✓" if node in picture.accepted else ""
    return " ".join(part for part in (picture.labels[node], picture.notes[node], mark) if part)


def _shown(label: str) -> str:
    """The label in one line: blanks at its ends visible, what has no glyph escaped, its end cut off."""
    inner = label.strip(" ")
    before = len(label) - len(label.lstrip(" "))
    whole = "␣" * before + inner + "␣" * (len(label) - before - len(inner))
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _columns(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide
