"""Pages of other origins may ask: what browsers want to be told (https://fetch.spec.whatwg.org/#http-cors-protocol). Pure ASGI."""

from __future__ import annotations

from collections.abc import Sequence

from danlu.errors import RequestError
from danlu.serve.asgi import App, Message, Receive, Reply, Scope, Send, send_reply
from danlu.serve.openai.common import error_response

SHOWN = "x-request-id, retry-after"
"""Headers of an answer that a page may read."""
REMEMBERED_S = 600


class Cors:
    """ASGI middleware, before keys are looked at: a browser's question whether it may ask carries none."""

    def __init__(self, app: App, origins: Sequence[str]) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]} if scope["type"] == "http" else {}
        origin = headers.get(b"origin")
        if origin is None:
            await self.app(scope, receive, send)
            return
        may = "*" in self.origins or origin in self.origins
        told = {"access-control-allow-origin": "*" if "*" in self.origins else origin, "vary": "origin"} if may else {"vary": "origin"}
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            await send_reply(send, *_preflight(may, origin, headers, told))
            return

        async def with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = told | ({"access-control-expose-headers": SHOWN} if may else {})
                raw = [(name.encode(), value.encode("latin-1")) for name, value in more.items()]
                message = {**message, "headers": [*message["headers"], *raw]}
            await send(message)

        await self.app(scope, receive, with_origin)


def _preflight(may: bool, origin: str, headers: dict[bytes, str], told: dict[str, str]) -> tuple[Reply, dict[str, str]]:
    if not may:
        error = RequestError(
            f"pages of {origin[:200]} may not ask", status=403, kind="permission_error", fix="http.allowed_origins of the service"
        )
        return Reply(error_response(error), error.status), told
    asked = headers.get(b"access-control-request-headers", "")[:1000]
    allowed = {"access-control-allow-methods": "GET, POST", "access-control-max-age": str(REMEMBERED_S)}
    return Reply(b""), told | allowed | ({"access-control-allow-headers": asked} if asked else {})
