"""Tables, and a console for them, that lose nothing of what they show: rich shortens what does not fit."""

import os
import sys

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

UNBOUNDED = 100_000  # columns
WORDS = ("", "layer", "point", "CPU")  # names of columns that hold no figures


def table_console() -> Console:
    """A console for standard output.

    Tables get the width of a terminal, or what COLUMNS says. A file or another program has none: there, every row is
    one line. Names are printed as they are: what stands in brackets is no markup.
    """
    bounded = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if bounded else UNBOUNDED, markup=False, emoji=False)


def folding_table(*columns: str, title: str = "", caption: str = "", footers: dict[str, str] | None = None) -> Table:
    """A table without rows; what is too long for a cell goes on in its next line.

    Args:
        columns: their names, shown unless all are empty.
        title, caption: text above and below, which the table is at least as wide as.
        footers: values of the last row, by column.
    """
    table = Table(
        title=title or None,
        caption=caption or None,
        show_header=any(columns),
        show_footer=footers is not None,
        min_width=max(map(cell_len, [*title.splitlines(), *caption.splitlines()]), default=0),
    )
    for name in columns:
        justify = "left" if name in WORDS else "right"
        table.add_column(name, footer=(footers or {}).get(name, ""), justify=justify, overflow="fold")
    return table
