"""How every command starts: flags, quiet logs, and errors of the user's as one line, status 1."""

import logging as python_logging
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_dict

from one_jax.errors import ConfigError, UserError


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; a `UserError` ends it with one line and status 1."""

    def guarded_main(argv: list[str]) -> None:
        if len(argv) > 1:
            _exit(UserError(f'argument {argv[1]!r} is not understood: flags begin with --'))
        _quieten_logs()
        try:
            main()
        except UserError as error:
            _exit(error)

    app.run(guarded_main, flags_parser=_parse_flags)


def _exit(error: UserError) -> None:
    sys.exit(f'error: {error}')


def _quieten_logs() -> None:
    """The program's own lines go to standard output; of the libraries, only warnings are shown."""
    logging.set_verbosity(logging.WARNING)
    for library in ('jax', 'orbax', 'tensorflow', 'etils'):
        python_logging.getLogger(library).setLevel(python_logging.WARNING)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        missing_config = _missing_config()
    except flags.UnrecognizedFlagError as error:
        return _exit(UserError(str(error)))
    except Exception as error:  # whatever a config file raises, and ml_collections' own errors
        return _exit(_explain(argv, error))
    return _exit(missing_config) if missing_config else rest


def _missing_config() -> UserError | None:
    """Notices the object that ml_collections puts in place of a missing config file."""
    if 'config' not in flags.FLAGS:
        return None
    flag = flags.FLAGS['config']
    if isinstance(flag.value, config_dict.ConfigDict | None):
        return None
    return UserError(f'--config={flag.config_filename}: no such file')


def _explain(argv: list[str], error: Exception) -> UserError:
    """Says in one line what is wrong with a --config flag or with a --config.field override."""
    overrides = [arg for arg in argv[1:] if re.match(r'--?config\.', arg)]
    plain_argv = [arg for arg in argv if arg not in overrides]
    flags.FLAGS.unparse_flags()
    sys.argv = plain_argv  # where ml_collections looks for overrides; the process ends soon
    try:
        flags.FLAGS(plain_argv, known_only=True)
    except Exception as config_error:
        last_line = str(config_error).strip().splitlines()[-1]
        return UserError(re.sub(r'^[\w.]*Error: ', '', last_line))
    if missing_config := _missing_config():
        return missing_config
    config = flags.FLAGS.config
    for override in overrides:
        field, _, value = override.lstrip('-').removeprefix('config.').partition('=')
        group, walked = config, []
        for part in field.split('.'):
            if not hasattr(group, 'keys') or part not in group:
                where = '.'.join(walked) or 'config'
                fields = sorted(group.keys()) if hasattr(group, 'keys') else ['no fields']
                return UserError(
                    f'{field}={value!r} is not allowed: {where} has no field {part!r}, '
                    f'but {", ".join(fields)}'
                )
            # The type of a field that is None until the method decides is known all the same.
            kind = group.get_type(part).__name__
            group = group[part]
            walked.append(part)
        if f'config.{field}=' in str(error):
            example = '' if group is None else f', such as {group!r}'
            return ConfigError(field, value, f'it must be of type {kind}{example}')
    return UserError(' '.join(str(error).split()))
