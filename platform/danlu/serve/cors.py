"""Pages of other origins may ask: what browsers want to be told (https://fetch.spec.whatwg.org/#http-cors-protocol), by Starlette."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from starlette.middleware.cors import CORSMiddleware

from danlu.serve.asgi import App

SHOWN = ("x-request-id", "retry-after")
"""Headers of an answer that a page may read."""


def open_to(app: App, origins: Sequence[str]) -> App:
    """The app, answering browsers' questions of whether a page may ask before keys are looked at: such a question carries none. As it is
    where nobody's pages may."""
    if not origins:
        return app
    asgi = cast(Any, app)
    return cast(App, CORSMiddleware(asgi, origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=SHOWN))
