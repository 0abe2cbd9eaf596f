"""API keys: a file of hashes, and the ASGI middleware that lets holders of a key in. A key itself is shown once and kept nowhere."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from danlu.errors import DanluError, RequestError, SpecError, StorageError
from danlu.metrics import catalog
from danlu.serve.openai.common import error_response

PREFIX = "dk-"
SHOWN = 10
"""Characters of a key that may be seen again: enough to tell which it is, 43 others are secret."""
LOOK_EVERY_S = 0.5
OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json")
"""Answered without a key: probes of a kubelet, and pages that hold no answers."""

logger = logging.getLogger("danlu.serve.keys")
requests = logging.getLogger("danlu.serve")
"""The log that has a line for each request."""


class Key(BaseModel):
    """What is kept of a key. 256 random bits need no slow hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.@]{0,63}$")]
    prefix: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    models: tuple[str, ...] = ("*",)
    """Names of models and adapters it may ask, `*` and `?` as in file names."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] | None = None
    """At once, in one replica; more get 429."""

    def may_ask(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def state(self, now: datetime) -> str:
        """`valid`, `revoked` or `expired`."""
        return "revoked" if self.revoked else "expired" if self.expires and self.expires <= now else "valid"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    keys: list[Key]


def read_keys(path: Path) -> list[Key]:
    """All keys of a file; StorageError if it is not there or not what `danlu keys` writes."""
    try:
        return _File.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", where="keys", fix="danlu keys create NAME makes one") from error
    except ValidationError as error:
        # Pydantic would repeat what stands there.
        places = ", ".join(".".join(map(str, one["loc"])) or "the document" for one in error.errors(include_input=False)[:3])
        raise StorageError(f"{path} is no file of keys: {places}", where="keys", fix="danlu keys create NAME --file ANOTHER") from None


def create_key(
    path: Path,
    name: str,
    *,
    lifetime: timedelta | None = None,
    models: Sequence[str] = (),
    max_ongoing_requests: int | None = None,
    now: datetime | None = None,
) -> str:
    """Add a key to a file, which is made if need be; the key, which nobody can find out again."""
    keys = read_keys(path) if path.exists() else []
    now = now or datetime.now(UTC)
    if any(key.name == name and key.state(now) == "valid" for key in keys):
        raise SpecError(f"there is a valid key named {name!r}", where="name", fix=f"another name, or danlu keys revoke {name} first")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        made = Key(
            name=name,
            prefix=secret[:SHOWN],
            sha256=_hash(secret),
            created=now.replace(microsecond=0),
            expires=None if lifetime is None else (now + lifetime).replace(microsecond=0),
            models=tuple(models) or ("*",),
            max_ongoing_requests=max_ongoing_requests,
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise SpecError(first["msg"], where=".".join(map(str, first["loc"])), fix="letters, digits, - _ . @ in a name") from None
    _write(path, [*keys, made])
    return secret


def revoke_key(path: Path, name: str) -> Key:
    """Make the valid key with this name or prefix invalid. It stays in the file, so that a service whose last key goes is not open."""
    keys, now = read_keys(path), datetime.now(UTC)
    found = [key for key in keys if name in (key.name, key.prefix) and key.revoked is None]
    if not found:
        known = ", ".join(key.name for key in keys if key.revoked is None)
        raise SpecError(f"{path} has no key named {name!r}", where="name", fix=known or "danlu keys list")
    gone = found[-1].model_copy(update={"revoked": now.replace(microsecond=0)})
    _write(path, [gone if key is found[-1] else key for key in keys])
    return gone


class KeyRing:
    """The keys of a file, as they are now. While it cannot be read, those of the last time count."""

    def __init__(self, path: Path) -> None:
        self.path, self.keys = path, read_keys(path)
        self.seen, self.looked, self.is_readable = self._stamp(), time.monotonic(), True

    def find(self, secret: str) -> Key | None:
        """Whose key it is, in a time that does not depend on what was given; None if it is nobody's, expired or revoked."""
        self._look()
        given, found = _hash(secret), None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, given):
                found = key
        return found if found and found.state(datetime.now(UTC)) == "valid" else None

    def is_empty(self) -> bool:
        self._look()
        return not self.keys

    def next_expiry(self) -> float:
        """Unix time at which the first of the valid keys expires; 0 if none will."""
        self._look()
        now = datetime.now(UTC)
        return min((key.expires.timestamp() for key in self.keys if key.expires and key.state(now) == "valid"), default=0.0)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self.looked < LOOK_EVERY_S:
            return
        self.looked = now
        stamp = self._stamp()
        if stamp == self.seen and self.is_readable:
            return
        try:
            self.keys, self.is_readable = read_keys(self.path), True
        except DanluError as error:
            if self.is_readable or stamp != self.seen:
                logger.warning("keys: %s; those read before go on counting", error.problem)
            self.is_readable = False
        self.seen = stamp

    def _stamp(self) -> tuple[int, int, int] | None:
        """Changes with the file, also where Kubernetes swaps the link to a mounted secret."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


class Authenticated:
    """ASGI middleware: 401 without a valid key as soon as there is one; who asks stands in the scope as `danlu.key`. `count` meters."""

    def __init__(self, app: Callable[..., Awaitable[None]], ring: KeyRing, count: Callable[..., None]) -> None:
        self.app, self.ring, self.count = app, ring, count

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "http" and (scope["path"].rstrip("/") or "/") not in OPEN_PATHS and not self.ring.is_empty():
            key = self.ring.find(_bearer(scope["headers"]))
            if key is None:
                self.count(catalog.SERVE_REFUSALS, 1, reason="401")
                request_id = next((value.decode("latin-1")[:128] for name, value in scope["headers"] if name == b"x-request-id"), "")
                requests.info("request", extra={"about": {"request_id": request_id, "method": scope["method"], "status": "401"}})
                await _refuse(send)
                return
            scope["danlu.key"] = key
        await self.app(scope, receive, send)


def _bearer(headers: Sequence[tuple[bytes, bytes]]) -> str:
    given = next((value for name, value in headers if name.lower() == b"authorization"), b"").decode("latin-1")
    scheme, _, secret = given.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


async def _refuse(send: Callable[..., Any]) -> None:
    error = RequestError("a valid API key is needed", status=401, code="invalid_api_key", fix="authorization: Bearer dk-...")
    body = json.dumps(error_response(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _write(path: Path, keys: Sequence[Key]) -> None:
    """Whole or not at all, and for its owner only."""
    document = json.dumps({"keys": [key.model_dump(mode="json", exclude_none=True) for key in keys]}, indent=1) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", where="keys", fix="--file elsewhere") from error
