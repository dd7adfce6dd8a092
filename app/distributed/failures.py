"""What Ray's errors say, in one line: theirs hold the traceback of another process."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ray._private.services import canonicalize_bootstrap_address

from app.errors import NormGateError

_ANSWER_S: Final = 5


@contextmanager
def joining() -> Iterator[None]:
    """A context in which a cluster is joined or started.

    Raises:
        NormGateError: it cannot be; where nobody listens at the cluster's address, at once.
    """
    try:
        _check_somebody_listens()
        yield
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NormGateError(f"Ray cannot be reached: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """The last line of an error's message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _check_somebody_listens() -> None:
    """Return when the cluster's address accepts a connection: Ray would try for minutes.

    Raises:
        ConnectionError: it does not.
    """
    address = _address()
    if address is None:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        reason = error.strerror or error
        raise ConnectionError(f"nobody answers at {address}: {reason}") from error


def _address() -> str | None:
    """``host:port`` of the cluster that Ray will join; None where it will start one."""
    try:
        return canonicalize_bootstrap_address(None)  # type: ignore[arg-type] # as Ray does
    except ValueError:
        # ``ray://``, or a mistake: Ray has its own words for both.
        return None
