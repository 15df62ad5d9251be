"""What is wrong with how a page looks, as sentences; nothing where all is well."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from builders.browser import Chromium

PHONE, DESKTOP = (390, 844), (1280, 800)
_MEASURE = (Path(__file__).parent / "page_facts.js").read_text(encoding="utf-8")
_LEAST_CONTRAST = 4.5
_LEAST_PIXELS = 10.0
_UNITS = re.compile(
    r"\b(ms|milliseconds|nats per token|MB|layer|neurons|KV group|thousands of tokens|share of|kept"
    r"|prompt tokens|sequences in a batch|threads|operations per byte|Gop/s)\b"
)


def faults(browser: Chromium, page: Path, size: tuple[int, int], *, dark: bool) -> list[str]:
    """Overlaps, what is cut, what is too faint or too small, and a verdict below the fold."""
    width, height = size
    browser.open(page, width=width, height=height, dark=dark)
    found = browser.evaluate(_MEASURE)
    said = [f"the page is {found['width']} pixels wide"] if found["width"] > width else []
    said += [f"{tag} is cut at the right" for tag in found["cut"]]
    for what in ("verdict", "why"):
        if found[what] is None or found[what] > height:
            said.append(f"the {what} ends at {found[what]}, of {height}")
    for one in found["texts"]:
        if one["contrast"] < _LEAST_CONTRAST:
            said.append(f"{one['text']!r} has a contrast of {one['contrast']:.2f}")
        if one["size"] < _LEAST_PIXELS:
            said.append(f"{one['text']!r} is {one['size']:.1f} pixels high")
    return said + [f"{a!r} lies on {b!r}" for a, b in _overlaps(found["texts"])]


def _overlaps(texts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    boxes = sorted(
        ((_ink(box), place) for place, one in enumerate(texts) for box in one["boxes"]),
        key=lambda found: found[0][1],
    )
    for at, (box, place) in enumerate(boxes):
        for other, its_place in boxes[at + 1 :]:
            if other[1] >= box[3]:
                break
            if place != its_place and box[0] < other[2] and other[0] < box[2]:
                yield texts[place]["text"], texts[its_place]["text"]


def _ink(box: Sequence[float]) -> tuple[float, float, float, float]:
    """A line's box without the room above and below its letters."""
    left, top, right, bottom = box
    spare = 0.18 * (bottom - top)
    return left + 1, top + spare, right - 1, bottom - spare


def axes_without_unit(html: str) -> list[str]:
    """Axes of the figures that have numbers and no unit, each as the texts that stand there."""
    found = []
    for figure in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        for axis in re.split(r'<g id="[\w-]*matplotlib\.axis_\d+">', figure)[1:]:
            axis = axis[: _end_of_group(axis)]
            ticks = re.findall(r'<g id="[\w-]*[xy]tick_\d+">.*?</text>', axis, flags=re.DOTALL)
            numbers = [text for tick in ticks if re.fullmatch(r"\W?[\d.,]+", text := _text_of(tick))]
            rest = axis
            for tick in ticks:
                rest = rest.replace(tick, "")
            label = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", rest))
            if len(numbers) > len(ticks) / 2 and not _UNITS.search(label):
                found.append(f"{label!r} beside {', '.join(numbers)}")
    return found


def _text_of(tick: str) -> str:
    return "".join(re.findall(r"<text[^>]*>([^<]*)</text>", tick))


def _end_of_group(text: str) -> int:
    """Where the group ends that was opened before ``text``."""
    depth = 1
    for found in re.finditer(r"<g\b|</g>", text):
        depth += 1 if found[0] == "<g" else -1
        if depth == 0:
            return found.start()
    return len(text)


def pages_of(pdf: bytes) -> int:
    """How many sheets a PDF has."""
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))
