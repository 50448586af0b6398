"""Tables as plain text and as Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def format_cell(value: Any, digits: int = 2) -> str:
    """A value as the text of a cell; `digits` are those of a float."""
    if value is None:
        return ''
    return f'{value:.{digits}f}' if isinstance(value, float) else str(value)


def format_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table as plain text: words to the left, numbers to the right.

    Args:
      rows: the cells by column. Floats get two decimals, None and missing cells stay empty, and a
        string may have several lines.
      columns: names, which are the headings too.
    """
    cells = [[format_cell(row.get(column)).split('\n') for column in columns] for row in rows]
    columns_of_cells = list(zip(*cells, strict=True)) if cells else [[] for _ in columns]
    widths = [
        max(len(line) for line in [name, *(line for cell in column for line in cell)])
        for name, column in zip(columns, columns_of_cells, strict=True)
    ]
    numeric = [all(re.match(r'[-\d]|$', cell[0]) for cell in column) for column in columns_of_cells]

    def join(entries: Iterable[str]) -> str:
        aligned = (
            entry.rjust(width) if right else entry.ljust(width)
            for entry, width, right in zip(entries, widths, numeric, strict=True)
        )
        return '  '.join(aligned).rstrip()

    lines = [join(columns), '  '.join('-' * width for width in widths)]
    for row in cells:
        for index in range(max(map(len, row))):
            lines.append(join(cell[index] if index < len(cell) else '' for cell in row))
    return '\n'.join(lines)


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The same table as Markdown; see `format_table`."""
    lines = [columns, ['---'] * len(columns)]
    for row in rows:
        cells = [format_cell(row.get(column)) for column in columns]
        lines.append([cell.replace('|', '\\|').replace('\n', '<br>') for cell in cells])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
