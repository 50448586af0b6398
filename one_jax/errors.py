"""Errors that the user can fix: commands print them as one line and exit with status 1."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any


class UserError(ValueError):
    """Bad input: a config field, a file or a data set. The message includes what to do."""


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
        super().__init__(f'{field}={value!r} is not allowed: {allowed}')


def require(condition: bool, field: str, value: Any, allowed: str | Iterable[Any]) -> None:
    """Raises `ConfigError(field, value, allowed)` unless `condition` holds."""
    if not condition:
        raise ConfigError(field, value, allowed)


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
