"""What a program compiled for TPU costs, from the estimates in the compiler's own text."""

import math
import re
from collections import Counter

# Parts of a train step, by a component of the names that JAX gives its operations; the first that
# is found counts.
PARTS = {
    'input': ('input',),
    'optimizer': ('optimizer',),
    'teachers': ('teachers',),
    'aggregator': ('aggregator',),
    'heads': ('head', r'head_\d+'),
    'trunk': ('trunk',),
}
OTHER = 'loss and rest'
FORWARD, BACKWARD = 'forward', 'backward'
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 's32': 4, 'u32': 4, 'f64': 8}
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_NAME = re.compile(r'op_name="([^"]*)"')
_ALL_REDUCE = re.compile(r'= (.*?) all-reduce(?:-start)?\(')
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')


def estimated_cycles(text: str) -> dict[tuple[str, str], int]:
    """Sums the compiler's estimates by part of the step and direction.

    Args:
      text: `compiled.as_text()` of a train step for TPU; other compilers estimate nothing.

    Returns:
      Cycles of one device by (part, 'forward' or 'backward'). Operations without an estimate, such
      as communication, are not in it; a loop counts once.
    """
    cycles: Counter[tuple[str, str]] = Counter()
    for line in text.splitlines():
        if found := _CYCLES.search(line):
            name = match[1] if (match := _NAME.search(line)) else ''
            cycles[part_of(name)] += int(found[1])
    return dict(cycles)


def part_of(name: str) -> tuple[str, str]:
    """Returns the part of the train step and the direction of an operation by its name."""
    components = name.split('/')
    direction = BACKWARD if any(x.startswith('transpose(') for x in components) else FORWARD
    for part, patterns in PARTS.items():
        if any(re.fullmatch('|'.join(patterns), component) for component in components):
            return part, direction
    return OTHER, direction


def all_reduces(text: str) -> tuple[int, int]:
    """Returns the number of all-reduces in a program, and the bytes that they sum on one device."""
    found = _ALL_REDUCE.findall(text)
    return len(found), sum(map(_size, found))


def _size(shapes: str) -> int:
    return sum(
        _BYTES[dtype] * math.prod(map(int, filter(None, sides.split(','))))
        for dtype, sides in _ARRAY.findall(shapes)
        if dtype in _BYTES
    )
