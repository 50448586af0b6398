"""Starts a command: parses its flags, quietens the logs and reports user errors as one line."""

import contextlib
import errno
import itertools
import logging as python_logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from one_jax.errors import ConfigError, UserError, printable
from one_jax.fields import REMOVED, RENAMED, flatten

# Errors of an output that takes no more, which has no name.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


def run(main: Callable[[], None], **required: str) -> None:
    """Parses the flags and runs `main`; a `UserError` is printed as one line, with status 1.

    Args:
      main: reads the flags.
      **required: the flags that must be given, each with an example of its value.
    """

    def guarded_main(argv: list[str]) -> None:
        if len(argv) > 1:
            _exit(f'argument {argv[1]!r} is not understood: flags begin with --')
        if any(not flags.FLAGS[name].value for name in required):
            examples = (f'--{name}={example}' for name, example in required.items())
            _exit(f'give {" and ".join(examples)}')
        _quieten_logs()
        main()

    with reporting_errors():
        app.run(guarded_main, flags_parser=parse_flags)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Prints a `UserError` of the block as one line, with status 1, and so an error of the system.

    Names that the terminal cannot print, or that could change it, are escaped. Each line is written
    at once, so that a signal loses none. If the reader of the output has gone, as in `| head`, the
    command ends quietly.
    """
    sys.stdout.reconfigure(errors='backslashreplace', line_buffering=True)
    try:
        try:
            with contextlib.redirect_stdout(_Terminal(sys.stdout)):
                yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        _exit(error)
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            # Of a file that no check foresaw: it is not a fault of the code.
            _exit(printable(f'{error.filename or "a file"!r}: {error.strerror or error}'))
        # Python flushes again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            sys.exit(128 + signal.SIGPIPE)
        _exit(f'the output cannot be written: {error.strerror}')


# Control characters, and those that turn the direction of writing.
_CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F))
_ESCAPES = {number: ascii(chr(number))[1:-1] for number in (*_CONTROLS, *range(0x2066, 0x206A))}


class _Terminal:
    """A text stream that escapes what could change the terminal, such as names of files."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text.translate(_ESCAPES))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _OrNone:
    def parse(self, argument: Any) -> Any:
        return None if argument in ('None', None) else super().parse(argument)


# --config.field=None works for every type; validation reports fields that may not be None.
_PARSERS = (flags.BooleanParser, flags.FloatParser, flags.IntegerParser, flags.ArgumentParser)
for _kind, _parser in zip((bool, float, int, str), _PARSERS, strict=True):
    _or_none = type('OrNone', (_OrNone, _parser), {})
    config_flags.register_flag_parser_for_type(_kind, _or_none())


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags and returns the other arguments; a mistake ends the program with one line.

    `--config=DIR/configs/X.py` works from every working directory: the folder above that of the
    config is put on the import path, where the config finds `configs.common`.
    """
    if (value := _config_flag(argv)) is not None and 'config' in flags.FLAGS:
        path = value.partition(':')[0]
        # Unlike `Path.is_file`, this returns False for a name that is too long.
        if not os.path.isfile(path):
            _exit(f'--config={path}: no such file')
        sys.path.insert(0, str(Path(path).resolve().parent.parent))
        recipe = _load_recipe(value)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # An unknown flag, or a value of the wrong type.
        return _exit(error)
    except (AttributeError, KeyError, TypeError, ValueError):
        # ml_collections did not find the field of an override.
        if error := _unknown_field(argv, flatten(recipe)):
            _exit(error)
        raise


def _load_recipe(value: str) -> config_dict.ConfigDict:
    """Returns the recipe that --config names; a fault in its file ends the program with one line.

    It is loaded again as the flags are parsed.
    """
    path = value.partition(':')[0]
    # ml_collections warns of what is an error below.
    logging.set_verbosity(logging.ERROR)
    try:
        recipe = flags.FLAGS['config'].parser.parse(value)
    except (Exception, SystemExit) as error:  # A recipe is a program: it may raise anything.
        cause = error
        while cause.__context__:
            cause = cause.__context__
        if isinstance(cause, UserError):
            _exit(cause)
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(cause.__traceback__)
            if os.path.abspath(frame.filename) == os.path.abspath(path)
        ]
        where = f' (line {lines[-1]})' if lines else ''
        _exit(printable(f'--config={path}: {type(cause).__name__}: {cause}') + where)
    if not isinstance(recipe, config_dict.ConfigDict):
        _exit(f'--config={path}: get_config returns no ConfigDict, but {type(recipe).__name__}')
    return recipe


def _config_flag(argv: list[str]) -> str | None:
    """Returns the value of --config, or None without one."""
    for flag, following in itertools.pairwise([*argv[1:], '']):
        if match := re.fullmatch(r'--?config(=.*)?', flag):
            return (match[1] or f'={following}')[1:]
    return None


def _unknown_field(argv: list[str], config: Mapping[str, Any]) -> UserError | None:
    """Returns the error of the first --config.field override that names no field of `config`."""
    for flag in argv[1:]:
        match = re.fullmatch(r'--?(?:no)?config\.([^=]*)=?(.*)', flag)
        if match and match[1] not in config:
            field, group = match[1], match[1].rpartition('.')[0]
            fields = [name for name in config if name.rpartition('.')[0] == group and group]
            fields = fields or sorted({name.partition('.')[0] for name in config})
            allowed = f'there is no such field, only {", ".join(fields)}'
            if field in RENAMED:
                allowed = f'the field is now called {RENAMED[field]}'
            return ConfigError(field, match[2], REMOVED.get(field, allowed))
    return None


def _exit(error: object) -> None:
    sys.exit(f'error: {error}')


def _quieten_logs() -> None:
    """Shows only the warnings of the libraries: the program prints its own lines."""
    logging.set_verbosity(logging.WARNING)
    for library in ('jax', 'orbax', 'tensorflow', 'etils'):
        python_logging.getLogger(library).setLevel(python_logging.WARNING)
