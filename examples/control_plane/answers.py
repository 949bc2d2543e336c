"""Answers as JSON envelopes, and refusals that have an HTTP status but no business code."""

from __future__ import annotations

import json

from aiohttp import web

from remotegpu_schemas.wire import JsonObject


class Bare(Exception):
    """A refusal that is only a status (401, 403, ...); the body repeats it as its code."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def answer(envelope: JsonObject, status: int = 200) -> web.Response:
    """The envelope as a response."""
    text = json.dumps(envelope, ensure_ascii=False, separators=(",", ":"))
    return web.Response(body=text.encode("utf-8", "replace"), status=status, content_type="application/json")
