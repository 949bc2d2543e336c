"""Text that every peer can store, and the inline form of a run's output."""

from __future__ import annotations


def clean_text(data: bytes | str) -> str:
    """Text that every peer can store: invalid UTF-8, halves of surrogate pairs and NUL become U+FFFD."""
    if isinstance(data, str):
        text = data.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    else:
        text = data.decode("utf-8", "replace")
    return text.replace("\0", "\ufffd")


def inline_output(head: bytes, tail: bytes, total_bytes: int, limit_bytes: int) -> tuple[str, bool]:
    """The inline form of an output of `total_bytes`: whole if it fits, else head, marker line and tail.

    `head` is the output's beginning (all of it when it fits), `tail` its end. Returns the text and whether it was cut;
    the text is at most `limit_bytes` long as UTF-8.
    """
    is_whole = total_bytes <= len(head)
    if is_whole:
        text = clean_text(head)
        if len(text.encode()) <= limit_bytes:
            return text, False
    marker = f"\n... [remotegpu: output of {total_bytes} bytes cut here] ...\n"
    room = max(limit_bytes - len(marker), 0) // 2
    end = head if is_whole else tail
    text = _fit(clean_text(head), room) + marker + _fit(clean_text(end), room, from_end=True)
    return _fit(text, limit_bytes), True


def _fit(text: str, limit_bytes: int, *, from_end: bool = False) -> str:
    raw = text.encode()
    if len(raw) <= limit_bytes:
        return text
    cut = raw[len(raw) - limit_bytes :] if from_end else raw[:limit_bytes]
    return cut.decode("utf-8", "ignore")
