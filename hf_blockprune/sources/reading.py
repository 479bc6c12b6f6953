"""Reading data sets from disk or the network: what may go wrong, and how that is said."""

import tarfile
import zlib
from functools import cache


@cache
def read_errors() -> tuple[type[Exception], ...]:
    """What reading a data set may raise where files or the network, not this package, are at fault."""
    from aiohttp import ClientError
    from datasets.exceptions import DatasetsError

    return (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, DatasetsError, ClientError)


def reason(error: BaseException) -> str:
    """One line on what went wrong: the kind of the error and the first 300 characters of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def is_url(text: str) -> bool:
    """Whether it names something on the network."""
    return "://" in text
