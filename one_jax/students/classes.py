"""Matches the classes of a student with those of a data set, by name."""

from collections.abc import Sequence

from one_jax.errors import require
from one_jax.runtime import processes


def match(
    own: Sequence[str], theirs: Sequence[str], field: str, value: str
) -> tuple[int, ...] | None:
    """Returns the place in `own` of each class of `theirs`; None if the places are the same.

    Names that are only numbers, as of generated images, are matched by place, with a note. `theirs`
    may be empty: then nothing is compared.

    Args:
      own: names of the student's classes.
      theirs: names of the data set's classes.
      field, value: of the error, which names the student.

    Raises:
      ConfigError: the classes differ.
    """
    own, theirs = list(own), list(theirs)
    if own == theirs or not theirs:
        return None
    places = {name: place for place, name in enumerate(own)}
    if places.keys() == set(theirs) and len(places) == len(own) == len(theirs):
        note(f'{field}={value!r}: the data set has the classes in another order: matched by name')
        return tuple(places[name] for name in theirs)
    counted = [str(place) for place in range(len(own))]
    differences = {
        'the student lacks': [name for name in theirs if name not in places],
        'the data set lacks': sorted(places.keys() - set(theirs)),
    }
    found = '; '.join(f'{who} {_some(names)}' for who, names in differences.items() if names)
    allowed = f'the classes must be those of the data set: {found or "names repeat"}'
    require(len(own) == len(theirs) and counted in (own, theirs), field, value, allowed)
    numbered = 'the student' if own == counted else 'the data set'
    note(f'{field}={value!r}: {numbered} has numbers for class names: only their count is compared')
    return None


def note(text: str) -> None:
    """Prints a note, once for all processes."""
    if processes.is_first():
        print(f'note: {text}')


def _some(names: Sequence[str]) -> str:
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return ', '.join(map(repr, names[:5])) + more
