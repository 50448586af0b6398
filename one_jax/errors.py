"""The errors that are the user's to mend: commands print one line and exit with status 1."""

from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input: a config field, a file, a data set. The message says what to do."""


class ConfigError(UserError):
    """A config field whose value is not allowed.

    Args:
      field: the dotted name of the field, e.g. `'model.num_branches'`.
      value: the value it has.
      allowed: what it may be, in words, or the allowed values themselves.
    """

    def __init__(self, field: str, value: Any, allowed: str | Iterable[Any]):
        if not isinstance(allowed, str):
            allowed = 'one of ' + ', '.join(repr(choice) for choice in allowed)
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f'{field}={value!r} is not allowed: {allowed}')
