"""Typed access to a ``config.json``: every problem is told at once, by field, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

# As a default: there is none, the field has to be there.
REQUIRED: Any = object()


class ConfigReader:
    """Typed access to a parsed ``config.json`` that collects what is wrong instead of stopping at the first."""

    def __init__(self, config: Mapping[str, Any], prefix: str = "", problems: list[str] | None = None):
        self.config = config
        self.prefix = prefix
        self.problems: list[str] = [] if problems is None else problems

    def inside(self, name: str) -> ConfigReader:
        """The reader of an object within this one; empty if it is absent or null."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, Mapping):
            self.problem(name, "expected an object")
            value = None
        return ConfigReader(value or {}, f"{self.prefix}{name}.", self.problems)

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number: at least 1 where it is required, at least 0 where there is a default for absent and null."""
        least = 1 if default is REQUIRED else 0
        return self._value(
            name, default, lambda v: isinstance(v, int) and v >= least, f"a whole number, at least {least}"
        )

    def nullable(self, name: str) -> int | None:
        """A whole number of at least 0 or null, but there."""
        if name not in self.config:
            self.problems.append(f"{self.prefix}{name} is missing: expected a whole number or null.")
        return self.integer(name, None)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number as a float; the default for absent and null."""

        def fits(value: Any) -> bool:
            return isinstance(value, (int, float)) and math.isfinite(value)

        value = self._value(name, default, fits, "a number")
        return float(value) if isinstance(value, int) else value

    def flag(self, name: str, default: bool) -> bool:
        """True or false; the default for absent and null."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            self.problem(name, "expected true or false")
        return default if value is None else bool(value)

    def only(self, name: str, supported: tuple[Any, ...], why: str) -> None:
        """Refuse other values than these; absent and null are the first of them."""
        value = self.config.get(name)
        if value is not None and value not in supported:
            self.problem(name, f"not supported: {why}. Supported: {', '.join(map(repr, supported))}")

    def problem(self, name: str, text: str) -> None:
        """Note what is wrong with a field; its value is told."""
        self.problems.append(f"{self.prefix}{name}={self.config.get(name)!r}: {text}.")

    def check(self) -> None:
        """Raises ValueError that tells all problems."""
        if self.problems:
            raise ValueError(
                "config.json does not describe a model that can be taken over:\n  " + "\n  ".join(self.problems)
            )

    def _value(self, name: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
        value = self.config.get(name)
        if value is None and default is not REQUIRED:
            return default
        if value is None:
            self.problems.append(f"{self.prefix}{name} is missing: expected {what}.")
        elif isinstance(value, bool) or not fits(value):
            self.problem(name, f"expected {what}")
        else:
            return value
        return 1 if default is REQUIRED else default
