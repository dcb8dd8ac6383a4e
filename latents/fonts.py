"""Fonts for names in any script: matplotlib's font, else an installed font that has the letters."""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

# This font is part of matplotlib, and has accents, Greek, Cyrillic and Arabic.
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@cache
def characters(path: str) -> set[int]:
    """Returns the code points that a font covers; none if it is gone since matplotlib listed it."""
    with suppress(OSError, RuntimeError):
        return set(FT2Font(path).get_charmap())
    return set()


def installed() -> Iterator[font_manager.FontEntry]:
    """Yields matplotlib's font, then the installed fonts, upright and of normal weight first."""
    fonts = font_manager.fontManager.ttflist
    yield from (one for one in fonts if one.fname == str(FONT))
    for one in sorted(fonts, key=lambda one: (one.style != "normal", one.weight != 400, one.fname)):
        if "last resort" not in one.name.lower():  # its glyphs are boxes
            yield one


@cache
def font_with(text: str) -> font_manager.FontEntry | None:
    """Returns the first font that has all letters of a text; None if no font has them."""
    letters = set(map(ord, text))
    return next((one for one in installed() if letters <= characters(one.fname)), None)


def font_file(text: str) -> Path:
    """Returns the file of a font for a text; matplotlib's font if no font has all letters."""
    font = font_with(text)
    return FONT if font is None else Path(font.fname)


def font_families(texts: Iterable[str]) -> list[str]:
    """Returns the families that matplotlib needs to draw these texts, its own font first."""
    fonts = [font.name for text in texts if (font := font_with(text))]
    return list(dict.fromkeys(["DejaVu Sans", *fonts]))


def drawable(text: str) -> str:
    """Returns the text, or the text without accents, or "" if no font has its letters."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return next((one for one in (text, plain) if font_with(one)), "")
