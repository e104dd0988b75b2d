"""Error messages for a wrong configuration: which variable is wrong, and what is allowed. They quote no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from rsm.broker.settings import PREFIX, Settings

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False"}
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def explain(error: ValidationError, shown: Callable[[str], str] = str) -> str:
    """One sentence per mistake.

    Args:
        shown: turns a field of a model other than `Settings` into the name that users know.
    """
    found = error.errors(include_url=False, include_input=False)
    if error.title == Settings.__name__:
        return " ".join(_settings_message(e) for e in found)
    return " ".join(_named(e, shown(_field(e)) if _field(e) else "") for e in found)


def _settings_message(error: Any) -> str:
    name = _field(error)
    field = Settings.model_fields.get(name)
    allowed = _allowed(field) if field is not None and error["type"] != "value_error" else ""
    message = f"{PREFIX}{name.upper()} must be {allowed}" if allowed else _named(error, name and PREFIX + name.upper())
    return message.rstrip(".") + (_default(field) if field is not None else "") + "."


def _field(error: Any) -> str:
    return str(error["loc"][0]) if error["loc"] else ""


def _named(error: Any, name: str) -> str:
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    if not name:
        return f"{message}."
    return f"{name} {message}." if message.startswith("must ") else f"{name}: {message}."


def _allowed(field: FieldInfo) -> str:
    """The allowed values in words; "" for a type that has no short name."""
    if get_origin(field.annotation) is Literal:
        *others, last = get_args(field.annotation)
        return f"{', '.join(others)} or {last}"
    kind = _KINDS.get(field.annotation, "")
    found = [(word, getattr(m, name, None)) for m in field.metadata for name, word in _LIMITS.items()]
    limits = [f"{word} {limit}" for word, limit in found if limit is not None]
    return f"{kind}, {' and '.join(limits)}" if kind and limits else kind


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is None or isinstance(value, SecretStr):
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"
