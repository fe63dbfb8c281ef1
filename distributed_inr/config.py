"""Configuration: frozen, validated dataclasses; dotted overrides; JSON in and out; the command line.

Every option of every verb is a field of a config, addressed by one dotted path ("autoencoder.kl_weight") in flags,
sweeps, JSON files, logs and error messages. Values from outside enter only through `override` and `from_json`, which
validate.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import logging
import reprlib
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, NoReturn, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

C = TypeVar("C")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[C]) -> type[C]:
    """Make `cls` a frozen, keyword-only dataclass whose fields are validated and whose unknown keys are errors."""
    settings = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
    return pydantic_dataclass(frozen=True, kw_only=True, config=settings)(cls)  # type: ignore[return-value]


def to_dict(value: Any) -> dict[str, Any]:
    """The config as plain JSON types, nested like the config."""
    return json.loads(to_json(value))


def to_json(value: Any) -> str:
    return pydantic.TypeAdapter(type(value)).dump_json(value, indent=2).decode()


def from_json(cls: type[C], text: str) -> C:
    """Rebuild a config from JSON. Raises ValueError with the path, the value and the rule."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; expected the contents of a run's config.json") from None
    return _validate(cls, values)


def override(value: C, changes: Mapping[str, Any]) -> C:
    """A copy of `value` with dotted fields replaced and everything validated again.

    Setting `x.kind` of a union field switches to that variant with its own defaults; fields that both variants have
    keep their values only if they are set in `changes` too. Where x may be none, kind none makes it so. Strings are
    converted to the field's type, as on the command line.
    """
    tree = to_dict(value)
    flat = leaves(type(value), value)
    switched: list[dict[str, Any]] = []  # these hold only what is set in `changes`; validation knows their fields
    for path in sorted(changes, key=lambda path: (not path.endswith(".kind"), path.count("."), path)):
        *parents, name = path.split(".")
        node, above = tree, tree
        for parent in parents:
            absent = name == "kind" and path in flat and node.get(parent) is None  # a union that was none
            if absent or (parent not in node and any(node is other for other in switched)):
                switched.append({})
                node[parent] = switched[-1]
            above, node = node, node.get(parent)
            if not isinstance(node, dict):
                raise ValueError(_unknown("field", path, flat))
        if name == "kind" and changes[path] is None:
            above[parents[-1]] = None
            continue
        if name == "kind" and node.get("kind") != changes[path]:
            node.clear()
            switched.append(node)
        elif name not in node and not any(node is other for other in switched):
            raise ValueError(_unknown("field", path, flat))
        node[name] = changes[path]
    return _validate(type(value), tree)


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted paths whose values differ between two configs (or their dicts), as {path: (old, new)}."""
    flat_old, flat_new = (dict(_flatten(v if isinstance(v, Mapping) else to_dict(v))) for v in (old, new))
    paths = sorted(flat_old.keys() | flat_new.keys())
    return {p: (flat_old.get(p), flat_new.get(p)) for p in paths if flat_old.get(p) != flat_new.get(p)}


def leaves(cls: type, value: Any, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    """Every field of a nested config as {dotted path: (type, current value, help text)}, in declaration order."""
    found: dict[str, tuple[Any, Any, str]] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        current, path = getattr(value, field.name), f"{prefix}{field.name}"
        optional = type(None) in typing.get_args(hints[field.name])
        variants = _variants(hints[field.name])
        if dataclasses.is_dataclass(current):
            found |= leaves(type(current), current, f"{path}.")
            if variants:
                text = (
                    f"One of {', '.join(variants)}; another starts from its defaults: give it with --help to see them."
                )
                text = f"{variants[0]} is the only one." if len(variants) == 1 else text
                text += " none: without." if optional else ""
                found[f"{path}.kind"] = (str | None if optional else str, found[f"{path}.kind"][1], text)
        elif variants:
            text = cls.__pydantic_fields__[field.name].description or ""
            text += f" One of {', '.join(variants)}: give it with --help to see its options."
            found[f"{path}.kind"] = (str | None, None, text)
        else:
            found[path] = (hints[field.name], current, cls.__pydantic_fields__[field.name].description or "")
    return found


def parse(argv: Sequence[str], presets: Mapping[str, Callable[[], C]], *, default: str, description: str) -> C:
    """Read `[preset] [--a.b-c value ...]` into a config; `--help` lists every field with its meaning and default.

    Raises ValueError for unknown presets and flags (naming the nearest), wrong types and values out of range.
    """
    argv = list(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else default
    if name not in presets:
        raise ValueError(_unknown("preset", name, presets))
    value = presets[name]()
    kinds = {
        flag[2:].replace("-", "_"): kind for flag, kind in zip(argv, argv[1:], strict=False) if flag.endswith(".kind")
    }
    value = override(value, {path: kind for path, kind in kinds.items() if kind != "none"})

    fields = leaves(type(value), value)
    parser = Parser(
        usage=f"{sys.argv[0]} [preset] [--field value ...]",
        description=f"{description}\n\npresets: {', '.join(presets)} (default: {default})",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    optional = {path for path, (hint, _, _) in fields.items() if type(None) in typing.get_args(hint)}
    tuples = {
        p for p, (h, _, _) in fields.items() if any(typing.get_origin(x) is tuple for x in (h, *typing.get_args(h)))
    }
    for path, (hint, current, text) in fields.items():
        shown = " ".join(map(str, current)) if isinstance(current, tuple) else str(current)
        shown = "none" if current is None else shown
        parser.add_argument(
            "--" + path.replace("_", "-"),
            dest=path,
            nargs="*" if path in tuples else None,
            default=argparse.SUPPRESS,
            metavar=_metavar(hint),
            help=f"{text} (default: {shown})".replace("%", "%%"),
        )
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--" + path.replace("_", "-") for path in fields]
        raise ValueError(_unknown("flag", unknown[0].split("=")[0], flags))
    empty = {path for path, text in vars(parsed).items() if text in ("none", ["none"]) and path in optional}
    return override(value, {path: None if path in empty else text for path, text in vars(parsed).items()})


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a job's `main`: a user's mistake, or values not finite, becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run() -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            main()
        except (ValueError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return run


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become ValueErrors: one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists every flag")


def _validate(cls: type[C], values: Any) -> C:
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        # The location also names the union variants that were tried: keep field names, drop class names and tags.
        parts = [str(part) for part in first["loc"]]
        path = ".".join(_keep_fields(values, parts)).encode("unicode_escape").decode() or "the config"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "unexpected_keyword_argument":
            raise ValueError(f"{path} is not a field; remove it or check the spelling against --help") from None
        if first["type"] == "value_error":  # a cross-field rule: it already names its paths, values and remedy
            raise ValueError(message) from None
        if first["type"] == "union_tag_invalid":
            context = first.get("ctx", {})
            tag, tags = reprlib.repr(context.get("tag")), context.get("expected_tags")
            raise ValueError(f"{path}.kind={tag}: must be one of {tags}; see --help") from None
        raise ValueError(f"{path}={reprlib.repr(first['input'])}: {message}; see --help for what it accepts") from None


def _keep_fields(values: Any, parts: list[str]) -> Iterator[str]:
    for part in parts:
        if isinstance(values, Mapping) and part in values:
            values = values[part]
            yield part
        elif isinstance(values, list | tuple) and part.isdigit():
            yield part
        elif part == parts[-1] and part.isidentifier() and part.islower():
            yield part


def _variants(hint: Any) -> list[str]:
    """The `kind` tags of a union of configs."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        return [tag for member in typing.get_args(hint) for tag in _variants(member)]
    if not dataclasses.is_dataclass(hint):
        return []
    hints = typing.get_type_hints(hint)
    return [typing.get_args(hints["kind"])[0]] if "kind" in hints else []


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    same = [one for one in known if _last(one) == _last(name)]  # the right name in the wrong place
    nearest = difflib.get_close_matches(name, same or known, n=1, cutoff=0.0)
    return f"unknown {what} {name!r}; did you mean {nearest[0]}? --help lists all"


def _last(path: str) -> str:
    return path.lstrip("-").rpartition(".")[2]
