"""Starts a command: parses its flags, quietens the logs and reports user errors as one line."""

import contextlib
import itertools
import logging as python_logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags, logging

from one_jax.errors import ConfigError, UserError
from one_jax.fields import REMOVED, RENAMED, flatten


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
        with reporting_errors():
            main()

    app.run(guarded_main, flags_parser=parse_flags)


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Prints a `UserError` of the block as one line, with status 1.

    Names that the terminal cannot print are escaped. If the reader of the output has gone, as in
    `| head`, the command ends quietly.
    """
    with contextlib.suppress(AttributeError):  # Python has no stdout if it was closed.
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        _exit(error)
    except BrokenPipeError:
        # Python flushes again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags and returns the other arguments; a mistake ends the program with one line.

    `--config=DIR/configs/X.py` works from every working directory: the folder above that of the
    config is put on the import path, where the config finds `configs.common`.
    """
    config, _, _ = _config_flag(argv).partition(':')
    if config:
        if not Path(config).is_file():
            _exit(f'--config={config}: no such file')
        sys.path.insert(0, str(Path(config).resolve().parent.parent))
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # An unknown flag, a value of the wrong type, or an error in the config's own words.
        cause = error
        while cause.__context__:
            cause = cause.__context__
        return _exit(cause if isinstance(cause, UserError) else error)
    except (AttributeError, KeyError, TypeError):
        # ml_collections did not find the field of an override, or the config has a fault.
        if error := _unknown_field(argv):
            _exit(error)
        raise


def _config_flag(argv: list[str]) -> str:
    """Returns the value of --config, '' without one."""
    for flag, following in itertools.pairwise([*argv[1:], '']):
        if match := re.fullmatch(r'--?config(=.*)?', flag):
            return (match[1] or f'={following}')[1:]
    return ''


def _unknown_field(argv: list[str]) -> UserError | None:
    """Returns the error of the first --config.field override that names no field."""
    config = flatten(flags.FLAGS['config'].parser.parse(_config_flag(argv)))
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
