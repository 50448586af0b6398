"""Prints the constraints file: what `pip freeze` says in each of the given interpreters'
environments.

A package with one version everywhere is one line; else each version has the marker of its Python.
"""

import subprocess
import sys


def frozen(python: str) -> tuple[str, dict[str, str]]:
    """The Python version, e.g. '3.11', and the version of every package."""
    code = 'import sys; print("%d.%d" % sys.version_info[:2])'
    version = subprocess.check_output([python, '-c', code], text=True).strip()
    listing = subprocess.check_output(
        [python, '-m', 'pip', 'freeze', '--exclude-editable'], text=True
    )
    pins = dict(line.split('==') for line in listing.splitlines() if '==' in line)
    return version, pins


def main() -> None:
    """Merges the environments of the interpreters named on the command line."""
    environments = [frozen(python) for python in sys.argv[1:]]
    print('# Exact versions for a reproducible installation; made by `make constraints`.')
    for name in sorted(set().union(*(pins for _, pins in environments)), key=str.lower):
        versions = {python: pins[name] for python, pins in environments if name in pins}
        if len(set(versions.values())) == 1:
            print(f'{name}=={next(iter(versions.values()))}')
        else:
            for python, version in versions.items():
                print(f'{name}=={version}; python_version == "{python}"')


if __name__ == '__main__':
    main()
