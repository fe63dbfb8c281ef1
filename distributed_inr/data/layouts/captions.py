"""Captions made of what is known of raw items by templates, such as "a {size} {class}"."""

import collections
import math
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distributed_inr.data.layouts.item import Item, in_words, lines_of


@dataclass(frozen=True)
class _Scale:
    """Words for the smallest and the largest third of a class, by the product of some measurements."""

    small: str
    large: str
    fields: tuple[str, ...]


_SCALES = {
    "size": _Scale("small", "large", ("width_cm", "depth_cm", "height_cm")),
    "height": _Scale("low", "tall", ("height_cm",)),
    "width": _Scale("narrow", "wide", ("width_cm",)),
}
_ARTICLE = re.compile(r"(?:^|(?<=\W))a(?=\s+$)", re.IGNORECASE)
_VOWEL = re.compile(r"(?!eu|one\b|u[^\Waeiou][aeiou])[aeiou]", re.IGNORECASE)
"""How what takes "an" begins, to the ear: an urn and an upper cabinet, but a unit and a urinal."""

Parts = list[tuple[str, str | None]]
"""Of a template: what is written, and the placeholder after it, if there is one."""


def parse(template: str) -> Parts:
    """The parts of a template. Raises ValueError where it is malformed."""
    rule = "it must be text with placeholders as {class} in it, and {{ for a brace"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"--caption {template!r}: {error}; {rule}") from None
    for _, name, specification, conversion in parts:
        if name is not None and (not name or specification or conversion):
            raise ValueError(f"--caption {template!r}: a placeholder is a name alone; {rule}")
    if not template.strip():
        raise ValueError(f"--caption {template!r} is blank; {rule}")
    return [(literal, name) for literal, name, _, _ in parts]


def with_article(noun: str) -> str:
    """A chair, an armchair."""
    return f"{'an' if _VOWEL.match(noun) else 'a'} {noun}"


def templated(items: list[Item], templates: Sequence[str]) -> list[Item]:
    """Items with the captions that the templates make of them, in lower case, in place of their own.

    A template makes one of each of an item's own captions where it names {text}, and none where it names what is not
    known of the item. {size}, {height} and {width} are words for the smallest and the largest third of the objects of
    the item's class; of classes of one or two they are not known.
    """
    parsed = [(template, parse(template)) for template in templates]
    scales = _scaled(items)
    known = dict.fromkeys(name for item in items for name in _values(item, scales))
    for template, parts in parsed:
        for _, name in parts:
            if name is not None and name not in known:
                raise ValueError(
                    f"--caption {template!r}: {{{name}}} is known of no item; use some of "
                    + (" ".join(f"{{{one}}}" for one in known) or "what --metadata says, which is nothing")
                )

    def captions(item: Item) -> Iterator[str]:
        values = _values(item, scales)
        for _, parts in parsed:
            names = {name for _, name in parts if name is not None}
            if names <= values.keys():
                for text in values["text"] if "text" in names else ("",):
                    yield _filled(parts, {name: text if name == "text" else values[name][0] for name in names})

    return [replace(item, captions=lines_of(captions(item))) for item in items]


def _filled(parts: Parts, values: Mapping[str, str]) -> str:
    caption = ""
    for literal, name in parts:
        if name is not None and _VOWEL.match(values[name]):
            literal = _ARTICLE.sub("an", literal)
        caption += literal + ("" if name is None else values[name])
    return caption.lower()


def _values(item: Item, scales: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """What stands for each placeholder; the item's own field goes before a word for its measurements."""
    values: dict[str, tuple[str, ...]] = {"text": item.captions} if item.captions else {}
    for name, value in item.about.items():
        if isinstance(value, float) and math.isfinite(value):
            value = f"{value:.10g}"
        if isinstance(value, str | int) and not isinstance(value, bool):
            values[name] = lines_of([in_words(str(value)) if name == "class" else str(value)])
    words = {name: (scale[item.unit],) for name, scale in scales.items() if item.unit in scale}
    return words | {name: value for name, value in values.items() if value}


def _scaled(items: Iterable[Item]) -> dict[str, dict[str, str]]:
    """By placeholder, the word of each object that has one: of those below or above the terciles of its class."""
    found: dict[str, dict[str, str]] = {}
    for name, scale in _SCALES.items():
        classes: dict[str, dict[str, float]] = collections.defaultdict(dict)
        for item in items:
            if (value := _measured(item.about, scale.fields)) is not None:
                classes[str(item.about.get("class") or "")][item.unit] = value
        words = found[name] = {}
        for measured in classes.values():
            ordered, third = sorted(measured.values()), len(measured) // 3
            for unit, value in measured.items() if third else ():
                if value < ordered[third]:
                    words[unit] = scale.small
                elif value > ordered[-1 - third]:
                    words[unit] = scale.large
    return found


def _measured(about: Mapping[str, Any], fields: tuple[str, ...]) -> float | None:
    """The product of some fields; None where one is not known, or no length."""
    try:
        values = [float(about[name]) for name in fields]
    except (KeyError, TypeError, ValueError):
        return None
    return math.prod(values) if all(0 < value < math.inf for value in values) else None
