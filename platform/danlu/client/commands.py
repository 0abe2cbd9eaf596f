"""What `danlu keys` and `danlu bench serve` do, said aloud on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from danlu.errors import ResourceError, SpecError, StorageError
from danlu.terminal import show


def create_key(file: Path, name: str, tenant: str | None, expires: str | None, models: Sequence[str], max_ongoing: int | None) -> None:
    """Print a new key, alone on standard output."""
    from danlu.serve import keys

    secret = keys.create_key(file, name, tenant=tenant, lifetime=_lifetime(expires), models=models, max_ongoing_requests=max_ongoing)
    print(f"kept as a hash in {file}; it cannot be shown again", file=sys.stderr)
    show(secret)


def list_keys(file: Path) -> None:
    """Print a line a key."""
    from danlu.serve import keys

    found = keys.read_keys(file)
    for tenant in found.tenants:
        show(f"{tenant.name:<20} {tenant.budget_usd_per_week:g} USD in seven days")
    for key in found.keys:
        expires = f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "never"
        state = key.state(datetime.now(UTC))
        payer = f"  tenant {key.tenant}" if key.tenant else ""
        dates = f"created {key.created:%Y-%m-%d}  expires {expires}"
        show(f"{key.name:<20} {key.prefix}...  {state:<8} {dates}  {', '.join(key.models)}{payer}")


def revoke_key(file: Path, name: str) -> None:
    """Make a key invalid."""
    from danlu.serve import keys

    show(f"revoked {keys.revoke_key(file, name).name}")


def set_budget(file: Path, tenant: str, usd_per_week: float | None) -> None:
    """Give a tenant a budget, or take it away."""
    from danlu.serve import keys

    keys.set_budget(file, tenant, usd_per_week)
    told = "has no budget" if usd_per_week is None else f"may cost {usd_per_week:g} USD in seven days"
    show(f"{tenant} {told}; services that read {file} notice within a second")


def bench_serve(
    url: str,
    model: str | None,
    num_requests: int,
    concurrency: int,
    rate: float | None,
    max_tokens: int | None,
    seed: int,
    output: Path | None,
) -> None:
    """Print what clients see of a service under load."""
    from dataclasses import asdict

    import httpx

    from danlu.client.endpoint import base_url, headers, only_model
    from danlu.client.load import Load, measure
    from danlu.client.page import page

    if output is not None:
        _check_writable(output)  # or all would be measured for nothing
    with httpx.Client(base_url=base_url(url), headers=headers(), timeout=30) as client:
        try:
            model = model or only_model(client)
        except httpx.TransportError as error:
            raise ResourceError(f"nobody answers at {url}", where="url", fix="the URL of a service that runs") from error
    report, seen = measure(Load(base_url(url), model, num_requests, concurrency, rate, max_tokens=max_tokens, seed=seed, headers=headers()))
    show(report.text())
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".html").write_text(page(report, seen), encoding="utf-8")
        show(f"  written: {output.with_suffix('.json')}, {output.with_suffix('.html')}")


def _check_writable(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".json", ".html"):
            with output.with_suffix(suffix).open("a"):
                pass
    except OSError as error:
        raise StorageError(f"cannot write to {output}: {error}", where="--output", fix="a file in a folder that can be written") from error


def _lifetime(text: str | None) -> timedelta | None:
    if text is None:
        return None
    number, unit = text[:-1], text[-1:]
    if not number.isdigit() or unit not in "dh" or not 0 < int(number) < 100_000:
        raise SpecError(f"{text!r} is no lifetime", where="--expires", fix="a number of days or hours, as 30d or 12h")
    return timedelta(days=int(number)) if unit == "d" else timedelta(hours=int(number))
