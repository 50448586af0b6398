"""Errors that the user can fix: commands print them as one line and exit with status 1."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Of a value in an error, and of a whole error, in characters.
_LONGEST, _LONGEST_ERROR = 200, 2000


def printable(text: str) -> str:
    """Escapes what is no printable character: it could break a line or change the terminal."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shortened(text: str, length: int) -> str:
    """Cuts the middle out: the reason of an error is at its end."""
    half = length // 2
    return text if len(text) <= length else f'{text[:half]}...{text[-half:]}'


# Smaller numbers vanish in float32, some only when they are multiplied.
_TINY = 1e-12


class UserError(ValueError):
    """Bad input: a config field, a file or a data set. The message includes what to do."""

    def __init__(self, message: str):
        super().__init__(_shortened(printable(message), _LONGEST_ERROR))


class ConfigError(UserError):
    """A config field has a value that is not allowed.

    Args:
      field: dotted name of the field, e.g. `'model.num_branches'`.
      value: its value.
      allowed: what it may be, in words, or the allowed values.
    """

    def __init__(self, field: str, value: Any, allowed: str | Iterable[Any]):
        if not isinstance(allowed, str):
            allowed = 'one of ' + ', '.join(repr(choice) for choice in allowed)
        self.field, self.value, self.allowed = field, value, allowed
        shown = _shortened(repr(value), _LONGEST)
        super().__init__(f'{field}={shown} is not allowed: {allowed}')


def require(condition: bool, field: str, value: Any, allowed: str | Iterable[Any]) -> None:
    """Raises `ConfigError(field, value, allowed)` unless `condition` holds."""
    if not condition:
        raise ConfigError(field, value, allowed)


def require_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for the first value that is not of its kind, a `fields.Kind`."""
    for field in values:
        if field in kinds:
            allowed, suits = kinds[field]
            require(suits(values[field]), field, values[field], allowed)


def require_number(
    field: str, value: float, least: float, bound: float, closed: bool = False
) -> None:
    """Raises `ConfigError` unless `value` is in [least, bound), or [..., bound], and not tiny."""
    allowed = f'at least {least} and {"at most" if closed else "below"} {bound}'
    require(least <= value < bound or (closed and value == bound), field, value, allowed)
    require(value == 0 or abs(value) >= _TINY, field, value, f'0, or {_TINY} or more')


@contextlib.contextmanager
def explain(prefix: str, *kinds: type[Exception]) -> Iterator[None]:
    """Converts an error of `kinds` into a `UserError` of one line: `prefix: reason`."""
    try:
        yield
    except kinds as error:
        reason = str(error).partition('\n')[0] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f'no {reason}'
        raise UserError(f'{prefix}: {reason}') from None
