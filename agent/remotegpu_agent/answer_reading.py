"""The body of an HTTP answer within a bound, also where a proxy on the way has compressed it unasked."""

from __future__ import annotations

import urllib.parse
import zlib
from typing import Final

import aiohttp

from remotegpu_agent.contact import BadAnswer
from remotegpu_schemas import limits

_PIECE_BYTES: Final = 64 * limits.KIB
_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS
"""Both headers are known (zlib's manual, inflateInit2): `gzip` and `deflate` of RFC 9110, section 8.4.1."""


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The whole body. Raises BadAnswer for what breaks a bound, and for a coding that is not known.

    Its bounds are `max_bytes`, before and after decompression, and `limits.WIRE_ANSWER_MAX_VALUES`. The session must
    not decompress by itself. What is held at once is two times `max_bytes` at most.
    """
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in {"identity", "", "gzip", "x-gzip", "deflate"}:
        raise BadAnswer(f"the answer is in the coding {coding[:40]!r}, which was not asked for")
    chunks, size = [], 0
    async for chunk in response.content.iter_chunked(_PIECE_BYTES):
        size += len(chunk)
        if size > max_bytes:
            raise BadAnswer(f"the answer is longer than {max_bytes} bytes")
        chunks.append(chunk)
    body = b"".join(chunks)
    if coding not in {"identity", ""}:
        body = _decompressed(body, max_bytes)
    values = sum(map(body.count, (b",", b"[", b"{"))) if len(body) > limits.WIRE_ANSWER_MAX_VALUES else 0
    if values > limits.WIRE_ANSWER_MAX_VALUES:
        raise BadAnswer(f"the answer is made of more than {limits.WIRE_ANSWER_MAX_VALUES} values")
    return body


def _decompressed(body: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise BadAnswer(f"the compressed answer is damaged: {error}") from error
    if len(plain) > max_bytes:
        raise BadAnswer(f"the answer is longer than {max_bytes} bytes once it is decompressed")
    if not inflater.eof:
        raise BadAnswer("the compressed answer ended before it was whole")
    return plain


def redirect_sentence(response: aiohttp.ClientResponse) -> str:
    """What to do about an answer that names another place: no redirect is followed, since the token would go there."""
    return (
        f"HTTP {response.status}: the control plane redirects to {_place(response.headers.get('Location', ''))}, where "
        "the token is not sent; write the address at which it answers itself into control_plane.url"
    )


def _place(location: str) -> str:
    """Without credentials and query, which may be secrets."""
    try:
        parts = urllib.parse.urlsplit(location[: limits.WIRE_MESSAGE_MAX_CHARS])
    except ValueError:
        return "an address that is none"
    place = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return "".join(letter for letter in place[:200] if letter.isprintable()) or "nowhere"
