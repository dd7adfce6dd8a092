"""What Ray's errors say, in one line: theirs hold the traceback of another process."""

from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import NormGateError


@contextmanager
def joining() -> Iterator[None]:
    """A context in which a cluster is joined or started.

    Raises:
        NormGateError: it cannot be.
    """
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NormGateError(f"Ray cannot be reached: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """The last line of an error's message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
