"""Log lines: text for a person, JSON for a machine, an object a line with the ids of what it is about.

What a user wrote (prompts, texts, keys) and what a model answered stand in none of them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal

from danlu.errors import SpecError

VARIABLE = "DANLU_LOG_FORMAT"
"""`text` or `json`. Unset: commands write text, and replicas, training workers and the driver of a cluster's job write JSON."""
Format = Literal["text", "json"]

about: ContextVar[Mapping[str, object]] = ContextVar("about", default={})  # noqa: B039  # nobody changes it
"""Ids of what is being worked on, such as a request's: they stand on each line that is written meanwhile."""
_process: dict[str, object] = {}


def begin(default: Format, *, level: int = logging.INFO, **ids: object) -> None:
    """Write the lines of Danlu's loggers to stderr. `ids` stand on each line of this process. SpecError for a format that is none."""
    form = os.environ.get(VARIABLE) or default
    if form not in ("text", "json"):
        raise SpecError(f"{form!r} is no format of log lines", where=VARIABLE, fix="text or json")
    _process.clear()
    _process.update(ids)
    logger = logging.getLogger("danlu")
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, Lines):
            logger.removeHandler(handler)
    handler = _Stderr()
    handler.setFormatter(Lines(form))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


@contextmanager
def naming(**ids: object) -> Iterator[None]:
    """More ids for each line of this process, whatever thread writes it, while the block runs."""
    before = {name: _process[name] for name in ids if name in _process}
    _process.update(ids)
    try:
        yield
    finally:
        for name in ids:
            _process.pop(name, None)
        _process.update(before)


_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode  # made once: json.dumps would make one for each line


def event(logger: logging.Logger, message: str, told: Mapping[str, object]) -> None:
    """An INFO line of a path that is walked thousands of times a second: nobody is asked which line of the source wrote it."""
    if logger.isEnabledFor(logging.INFO):
        record = logging.LogRecord(logger.name, logging.INFO, "", 0, message, None, None)
        record.about = told
        logger.handle(record)


class Lines(logging.Formatter):
    """The one formatter. A record may bring a mapping `about`: log.info("request", extra={"about": {...}})."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.as_json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        told = {**_process, **about.get(), **getattr(record, "about", {})}
        stack = ""
        if record.exc_info or record.stack_info:
            stack = "\n".join(filter(None, [self.formatException(record.exc_info) if record.exc_info else "", record.stack_info or ""]))
        if self.as_json:
            when = f"{_second(int(record.created))}.{int(record.msecs):03}Z"
            line = {"time": when, "level": record.levelname, "logger": record.name, "message": record.getMessage(), **told}
            return _as_json(line | {"stack": stack} if stack else line)
        ids = "".join(f"  {name}={_quoted(value)}" for name, value in told.items())
        text = f"{_second(int(record.created))[11:]} {record.levelname} {record.name}: {record.getMessage()}{ids}"
        return f"{text}\n{stack}" if stack else text


@lru_cache(maxsize=2)
def _second(unix_time: int) -> str:
    """2026-01-31T12:00:00, in UTC."""
    return datetime.fromtimestamp(unix_time, UTC).isoformat().removesuffix("+00:00")


class _Stderr(logging.Handler):
    """Whatever sys.stderr is by then: Ray and others put their own in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001  # as logging does: a line that cannot be written is told, and no request fails for it
            self.handleError(record)


def _quoted(value: object) -> str:
    """A value that has spaces or control characters, which somebody may have sent us, stays on its line."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)
