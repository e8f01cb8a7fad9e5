"""Results as HTML for notebooks: texts with a color for each token, tables of colored cells.

Fragments have no script and refer to nothing outside. Colors are transparent and lie over the
background of the page, and letters keep its color: both are readable in light and in dark pages.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

BLUE, ORANGE = (66, 133, 244), (244, 133, 66)
MAX_OPACITY = 0.65  # of a color behind letters: black and white ones have enough contrast
LINE_END = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
SHOWN_END = f"{LINE_END}\n"  # in a text, where lines end
MONOSPACE = "font-family: monospace; line-height: 1.6"
CELL = (
    "padding: 2px 5px; text-align: left; white-space: pre; border: 1px solid rgba(128,128,128,.3)"
)


class Cell(NamedTuple):
    """A token of a text, or a cell of a table.

    Attributes
    ----------
    text
        Text to show.
    share
        Strength of the color, -1 to 1: blue above 0, orange below.
    title
        Text that a pointer over the cell shows.
    """

    text: str
    share: float = 0.0
    title: str = ""


def visible(text: str, line_end: str = LINE_END) -> str:
    """Return a text with a symbol in the place of each control character."""
    return "".join(
        line_end if x == "\n" else chr(0x2400 + ord(x)) if ord(x) < 32 else x for x in text
    )


def fragment(caption: str, *parts: str) -> str:
    """Return a block with a caption above the parts."""
    shown = f'<div style="opacity: .75; margin-bottom: 4px">{escape(caption)}</div>'
    return f'<div style="max-width: 100%; overflow-x: auto">{shown}{"".join(parts)}</div>'


def text(cells: Iterable[Cell]) -> str:
    """Return tokens as one text, each on its color; lines end as in the text."""
    spans = "".join(
        f'<span style="{_background(cell.share)}; border-radius: 2px"{_title(cell)}>'
        f"{escape(visible(cell.text, SHOWN_END))}</span>"
        for cell in cells
    )
    return f'<div style="{MONOSPACE}; white-space: pre-wrap">{spans}</div>'


def table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Return a table with a heading for each column, and a name for each row."""
    head = "".join(f'<th scope="col" style="{CELL}">{escape(visible(x))}</th>' for x in columns)
    lines = [f'<tr><td style="{CELL}"></td>{head}</tr>']
    for name, cells in rows:
        line = "".join(
            f'<td style="{CELL}; {_background(cell.share)}"{_title(cell)}>'
            f"{escape(visible(cell.text))}</td>"
            for cell in cells
        )
        lines.append(f'<tr><th scope="row" style="{CELL}">{escape(name)}</th>{line}</tr>')
    style = f"{MONOSPACE}; border-collapse: collapse; font-size: 90%"
    return f'<table style="{style}">{"".join(lines)}</table>'


def image(values: np.ndarray, title: str, width: int) -> str:
    """Return a matrix [n, m] of numbers from 0 to 1 as squares: the larger, the more blue."""
    n, m = values.shape
    pixels = np.empty((n, m, 4), np.uint8)
    pixels[..., :3] = BLUE
    pixels[..., 3] = np.rint(np.clip(values, 0, 1) * 255)
    data = base64.b64encode(_png(pixels)).decode()
    style = "image-rendering: pixelated; border: 1px solid rgba(128,128,128,.5); margin: 2px"
    return (
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{width * n // m}" '
        f'style="{style}" alt="{escape(title)}" title="{escape(title)}">'
    )


def _png(pixels: np.ndarray) -> bytes:
    """Return pixels [n, m, 4] of red, green, blue and opacity as a PNG file."""
    n, m, _ = pixels.shape
    lines = np.concatenate([np.zeros((n, 1), np.uint8), pixels.reshape(n, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", m, n, 8, 6, 0, 0, 0)  # 8 bits, red to opacity
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _background(share: float) -> str:
    red, green, blue = BLUE if share >= 0 else ORANGE
    opacity = MAX_OPACITY * min(1.0, abs(share)) if share == share else 0.0
    return f"background: rgba({red},{green},{blue},{opacity:.2f})"


def _title(cell: Cell) -> str:
    return f' title="{escape(cell.title)}"' if cell.title else ""
