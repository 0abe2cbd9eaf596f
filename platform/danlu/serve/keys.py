"""API keys: a file of hashes, and the ASGI middleware that lets holders of a key in. A key itself is shown once and kept nowhere."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from danlu.errors import DanluError, RequestError, SpecError, StorageError
from danlu.metrics import catalog
from danlu.serve.openai.common import error_response

P = ParamSpec("P")
T = TypeVar("T")

PREFIX = "dk-"
SHOWN = 10
"""Characters of a key that may be seen again: enough to tell which it is, 43 others are secret."""
LOOK_EVERY_S = 0.5
OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json")
"""Answered without a key: probes of a kubelet, and pages that hold no answers."""

logger = logging.getLogger("danlu.serve.keys")
requests = logging.getLogger("danlu.serve")
"""The log that has a line for each request."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][-A-Za-z0-9_.@]{0,63}$")]


class Key(BaseModel):
    """What is kept of a key. 256 random bits need no slow hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    tenant: Name | None = None
    """Who pays for it, alone or with other keys; unset: its holder."""
    prefix: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    models: tuple[str, ...] = ("*",)
    """Names of models and adapters it may ask, `*` and `?` as in file names."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] | None = None
    """At once, in one replica; more get 429."""

    @property
    def payer(self) -> str:
        """The tenant that its requests are counted for."""
        return self.tenant or self.name

    def may_ask(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def state(self, now: datetime) -> str:
        """`valid`, `revoked` or `expired`."""
        return "revoked" if self.revoked else "expired" if self.expires and self.expires <= now else "valid"


class Tenant(BaseModel):
    """Whose keys may cost how much. Told by alerts at 80 and 100 %; nobody is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    budget_usd_per_week: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class KeyFile(BaseModel):
    """What `danlu keys` writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()
    tenants: tuple[Tenant, ...] = ()


def read_keys(path: Path) -> KeyFile:
    """A file of keys; StorageError if it is not there or not what `danlu keys` writes."""
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror}", where="keys", fix=f"danlu keys create NAME --file {path} makes one"
        ) from error
    except ValidationError as error:
        # Pydantic would repeat what stands there.
        errors = error.errors(include_input=False)[:3]
        wrong = (
            one["ctx"]["error"] if one["type"] == "json_invalid" else ".".join(map(str, one["loc"])) or "the document" for one in errors
        )
        raise StorageError(
            f"{path} is no file of keys: {', '.join(wrong)}", where="keys", fix="danlu keys create NAME --file ANOTHER"
        ) from None


def _alone(change: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
    """Of two that change a file at once the second waits: it would write the first one's key, or its revocation, away."""

    @wraps(change)
    def changed(path: Path, /, *arguments: P.args, **named: P.kwargs) -> T:
        try:
            lock = os.open(path.parent, os.O_RDONLY)  # the file itself is replaced
        except OSError:  # it is not there yet, or the change says why not
            return change(path, *arguments, **named)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            return change(path, *arguments, **named)
        finally:
            os.close(lock)

    return changed


@_alone
def create_key(
    path: Path,
    name: str,
    *,
    tenant: str | None = None,
    lifetime: timedelta | None = None,
    models: Sequence[str] = (),
    max_ongoing_requests: int | None = None,
    now: datetime | None = None,
) -> str:
    """Add a key to a file, which is made if need be; the key, which nobody can find out again."""
    file = read_keys(path) if path.exists() else KeyFile()
    now = now or datetime.now(UTC)
    if any(key.name == name and key.state(now) == "valid" for key in file.keys):
        raise SpecError(f"there is a valid key named {name!r}", where="name", fix=f"another name, or danlu keys revoke {name} first")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        made = Key(
            name=name,
            tenant=tenant,
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
    _write(path, file.model_copy(update={"keys": (*file.keys, made)}))
    return secret


@_alone
def revoke_key(path: Path, name: str) -> Key:
    """Make the valid key with this name or prefix invalid. It stays in the file, so that a service whose last key goes is not open."""
    file, now = read_keys(path), datetime.now(UTC)
    found = [key for key in file.keys if name in (key.name, key.prefix) and key.revoked is None]
    if not found:
        known = ", ".join(key.name for key in file.keys if key.revoked is None)
        raise SpecError(f"{path} has no key named {name!r}", where="name", fix=known or "danlu keys list")
    gone = found[-1].model_copy(update={"revoked": now.replace(microsecond=0)})
    _write(path, file.model_copy(update={"keys": tuple(gone if key is found[-1] else key for key in file.keys)}))
    return gone


@_alone
def set_budget(path: Path, tenant: str, usd_per_week: float | None) -> None:
    """Give a tenant a budget in place of the one it has; None takes it away."""
    file = read_keys(path)
    known = sorted({key.payer for key in file.keys if key.revoked is None})
    if tenant not in known:
        raise SpecError(
            f"{path} has no key of {tenant!r}", where="tenant", fix=", ".join(known) or f"danlu keys create NAME --tenant {tenant}"
        )
    others = tuple(one for one in file.tenants if one.name != tenant)
    try:
        its = () if usd_per_week is None else (Tenant(name=tenant, budget_usd_per_week=usd_per_week),)
    except ValidationError:
        raise SpecError(f"{usd_per_week:g} USD are no budget", where="--usd-per-week", fix="a number above 0") from None
    _write(path, file.model_copy(update={"tenants": (*others, *its)}))


class KeyRing:
    """The keys of a file, as they are now. While it cannot be read, those of the last time count."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, read_keys(path)
        self.seen, self.looked, self.is_readable = self._stamp(), time.monotonic(), True

    def find(self, secret: str) -> Key | None:
        """Whose key it is, in a time that does not depend on what was given; None if it is nobody's, expired or revoked."""
        self._look()
        given, found = _hash(secret), None
        for key in self.file.keys:
            if hmac.compare_digest(key.sha256, given):
                found = key
        return found if found and found.state(datetime.now(UTC)) == "valid" else None

    def is_empty(self) -> bool:
        self._look()
        return not self.file.keys

    def next_expiry(self) -> float:
        """Unix time at which the first of the valid keys expires; 0 if none will."""
        self._look()
        now = datetime.now(UTC)
        return min((key.expires.timestamp() for key in self.file.keys if key.expires and key.state(now) == "valid"), default=0.0)

    def valid(self) -> list[Key]:
        """The keys that let somebody in now."""
        self._look()
        now = datetime.now(UTC)
        return [key for key in self.file.keys if key.state(now) == "valid"]

    def tenants(self) -> tuple[Tenant, ...]:
        """Those that have a budget."""
        self._look()
        return self.file.tenants

    def _look(self) -> None:
        now = time.monotonic()
        if now - self.looked < LOOK_EVERY_S:
            return
        self.looked = now
        stamp = self._stamp()
        if stamp == self.seen and self.is_readable:
            return
        try:
            self.file, self.is_readable = read_keys(self.path), True
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


def _write(path: Path, found: KeyFile) -> None:
    """Whole or not at all, and for its owner only."""
    # Without what says nothing: a service of an older release reads the file, too.
    document = found.model_dump_json(indent=1, exclude_none=True, exclude=None if found.tenants else {"tenants"}) + "\n"
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
