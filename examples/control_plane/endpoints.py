"""What happens to every call, whoever makes it: whatever is raised becomes an envelope of the caller's dialect."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from control_plane.answers import Bare
from control_plane.dialect import Dialect
from remotegpu_schemas.errors import CODES, Code, Refused
from remotegpu_schemas.wire import JsonObject

log = logging.getLogger(__name__)

Endpoint = Callable[[web.Request], Awaitable[web.StreamResponse]]


def endpoint(
    dialect: Dialect,
    new_id: Callable[[], str],
    handler: Callable[[web.Request], Awaitable[JsonObject | web.StreamResponse | None]],
) -> Endpoint:
    """The handler with its answers and refusals in envelopes; a response of its own (a file) goes as it is."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            if "\0" in request.path or any("\0" in value for value in request.query.values()):
                raise Refused(Code.INVALID_PARAMETERS, "the address must not contain a NUL character")
            data = await handler(request)
            return data if isinstance(data, web.StreamResponse) else dialect.success(data)
        except Refused as refusal:
            log.info("%s refused: %d %s", request.path, refusal.code, refusal)
            return dialect.failure(refusal.code, CODES[refusal.code].http_status, str(refusal))
        except Bare as refusal:
            log.info("%s refused: %d %s", request.path, refusal.status, refusal)
            return dialect.failure(refusal.status, refusal.status, str(refusal))
        except web.HTTPRequestEntityTooLarge as error:
            return dialect.failure(error.status, error.status, "the body is too large")
        except Exception:
            # The top of the loop over requests: one that fails must not hurt the others.
            error_id = new_id()
            log.exception("%s failed, error %s", request.path, error_id)
            message = f"internal error; see {error_id} in the log"
            return dialect.failure(Code.INTERNAL, CODES[Code.INTERNAL].http_status, message)

    return handle
