"""A small SVG writer: what a chart needs, escaped, the same text for the same calls. Lengths are pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

FONTS = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
# Of the widest font of the list, so that what has room by this has room in each.
_WIDTH, _BOLD_WIDTH = 0.63, 0.71


def text_width(text: str, size: float, *, is_bold: bool = False) -> float:
    """Return how wide a text is at most, in the fonts that are asked for."""
    return len(text) * size * (_BOLD_WIDTH if is_bold else _WIDTH)


class Drawing:
    """Collects shapes; the later ones lie over the earlier."""

    def __init__(self) -> None:
        self._shapes: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self._add("rect", x=x, y=y, width=width, height=height, fill=fill)

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, dash: str = "") -> None:
        dashes = {"stroke_dasharray": dash} if dash else {}
        self._add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, stroke_width=width, **dashes)

    def circle(self, x: float, y: float, radius: float, fill: str, stroke: str) -> None:
        self._add("circle", cx=x, cy=y, r=radius, fill=fill, stroke=stroke, stroke_width=1.5)

    def area(self, corners: Sequence[tuple[float, float]], base: float, right: float, fill: str) -> None:
        """Fill below a line of steps: from each corner's x on it has that corner's y, until `right`."""
        if not corners:
            return
        path = [f"M{_number(corners[0][0])} {_number(base)}"]
        now = base
        for x, y in corners:
            if _number(y) != _number(now):
                path += [f"H{_number(x)}", f"V{_number(y)}"]
                now = y
        self._add("path", d="".join([*path, f"H{_number(right)}", f"V{_number(base)}Z"]), fill=fill)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        anchor: str = "start",
        fill: str = "#000000",
        is_bold: bool = False,
        has_halo: bool = False,
    ) -> None:
        """Write one line; `y` is its baseline. A halo keeps it readable over lines."""
        more: dict[str, str | float] = {"font_size": size}
        if anchor != "start":
            more["text_anchor"] = anchor
        if is_bold:
            more["font_weight"] = "bold"
        if has_halo:
            more |= {"stroke": "#ffffff", "stroke_width": 4, "stroke_linejoin": "round", "paint_order": "stroke"}
        self._add("text", text, x=x, y=y, fill=fill, **more)

    def _add(self, tag: str, text: str | None = None, **attributes: Any) -> None:
        listed = "".join(
            f" {k.replace('_', '-')}={quoteattr(v if isinstance(v, str) else _number(v))}"
            for k, v in attributes.items()
        )
        end = "/>" if text is None else f">{escape(_printable(text))}</{tag}>"
        self._shapes.append(f"<{tag}{listed}{end}")

    def to_text(self, width: float, height: float, title: str, description: str) -> str:
        """Return the file's text, on white; title and description are for those who do not see it."""
        size = f'width="{_number(width)}" height="{_number(height)}" viewBox="0 0 {_number(width)} {_number(height)}"'
        return "\n".join(
            [
                '<?xml version="1.0" encoding="UTF-8"?>',
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title desc"'
                f" font-family={quoteattr(FONTS)}>",
                f'<title id="title">{escape(_printable(title))}</title>',
                f'<desc id="desc">{escape(_printable(description))}</desc>',
                f'<rect width="{_number(width)}" height="{_number(height)}" fill="#ffffff"/>',
                *self._shapes,
                "</svg>\n",
            ]
        )


def _number(value: float) -> str:
    """Return a number with one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")


def _printable(text: str) -> str:
    """Return text without what XML 1.0 has no way to write: control characters, lone surrogates."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
