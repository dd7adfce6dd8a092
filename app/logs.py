"""Logs as one JSON object a line on stderr, whoever writes them; ``serve`` alone configures it.

Our own lines, the standard library's loggers (uvicorn's and asyncio's among them), warnings and
exceptions that nobody caught take the same way out.
"""

import logging
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

Level = Literal["debug", "info", "warning", "error"]

_FIRST: Final = ("timestamp", "level", "event")

logger = structlog.get_logger()


class _Lines:
    """A text stream whose reader may go away: no request fails for want of a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def configure(level: Level) -> None:
    """Send every log of the process to stderr: JSON, or plain lines where that is a terminal.

    Args:
        level: least severity of our own lines; others' loggers start at warnings, because some
            tell the URLs they ask for.
    """
    lines: Any = _Lines(sys.stderr)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last = _for_terminals() if sys.stderr.isatty() else _for_machines()
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(lines),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, _stripped],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    _configure_standard_library(level, lines, formatter)
    _catch_the_uncaught()


def _for_machines() -> Sequence[Processor]:
    # Tracebacks as text: with the values of variables they would tell images and keys.
    return [
        structlog.processors.format_exc_info,
        _first_things_first,
        structlog.processors.JSONRenderer(),
    ]


def _for_terminals() -> Sequence[Processor]:
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(exception_formatter=plain)]


def _configure_standard_library(level: Level, lines: TextIO, formatter: logging.Formatter) -> None:
    severity = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(lines)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(severity, logging.WARNING))
    logging.getLogger("app").setLevel(severity)
    logging.captureWarnings(True)


def _catch_the_uncaught() -> None:
    """Log exceptions that would end a thread or the process, or vanish in a destructor."""

    def on_exit(*error: Any) -> None:
        if issubclass(error[0], KeyboardInterrupt):
            sys.__excepthook__(*error)
        else:
            logger.critical("uncaught exception", exc_info=error)

    def on_thread(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):
            error = (args.exc_type, args.exc_value, args.exc_traceback)
            name = args.thread.name if args.thread else None
            logger.error("uncaught exception in a thread", thread=name, exc_info=error)

    def on_destructor(args: Any) -> None:
        error = (args.exc_type, args.exc_value, args.exc_traceback)
        logger.error("exception that nobody could catch", source=repr(args.object), exc_info=error)

    sys.excepthook, threading.excepthook = on_exit, on_thread
    sys.unraisablehook = on_destructor


def _first_things_first(_: Any, __: str, event: EventDict) -> EventDict:
    """The same fields, time, severity and message in front, where a reader looks for them."""
    first = {name: event.pop(name) for name in _FIRST if name in event}
    return {**first, **event}


def _stripped(_: Any, __: str, event: EventDict) -> EventDict:
    # Warnings and uvicorn's tracebacks end in a line feed.
    event["event"] = event["event"].strip()
    return event
