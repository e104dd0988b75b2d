"""Copies a signature to methods that only pass their arguments on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def like(model: Callable[Concatenate[Any, P], Any]) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, P], R]]:
    """Gives a method the parameters of `model`, for `help` and type checkers. Its return type stays."""

    def give(method: Callable[..., R]) -> Callable[Concatenate[Any, P], R]:
        parameters = list(inspect.signature(model).parameters.values())
        returns = inspect.signature(method).return_annotation
        method.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
        return method

    return give
