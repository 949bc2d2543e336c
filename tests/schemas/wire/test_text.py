"""Text that every peer can store, within its bound."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from remotegpu_schemas import limits
from remotegpu_schemas.wire import clean_text, inline_output
from tests.schemas.support import property_test


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        pytest.param("plain", "plain", id="plain"),
        pytest.param(b"caf\xc3\xa9", "caf\u00e9", id="utf-8"),
        pytest.param(b"a\0b", "a\ufffdb", id="nul"),
        pytest.param("a\0b", "a\ufffdb", id="nul-in-text"),
        pytest.param(b"\xff\xfe", "\ufffd\ufffd", id="invalid"),
        pytest.param(b"ab\xc3", "ab\ufffd", id="cut-character"),
        pytest.param("a\udc80b", "a\ufffdb", id="half-of-a-surrogate-pair"),
        pytest.param("\ud83d\ude00", "\U0001f600", id="both-halves"),
        pytest.param("\U0001f600", "\U0001f600", id="beyond-the-bmp"),
        pytest.param("", "", id="empty"),
    ],
)
def test_clean_text(given_: bytes | str, expected: str) -> None:
    """NUL, invalid UTF-8 and halves of surrogate pairs become U+FFFD; everything else stays."""
    assert clean_text(given_) == expected


@property_test
@given(data=st.binary() | st.text(st.characters()))
def test_clean_text_can_be_stored_anywhere(data: bytes | str) -> None:
    """It is UTF-8 without NUL, cleaning it again changes nothing, and a text keeps its length at most."""
    text = clean_text(data)
    assert "\0" not in text
    assert clean_text(text) == text
    assert clean_text(text.encode()) == text
    assert len(text) <= len(data)


@pytest.mark.parametrize("output", [b"", b"hello\n", b"x" * limits.INLINE_OUTPUT_MAX_BYTES])
def test_short_output_is_whole(output: bytes) -> None:
    """What fits is sent as it is, and is not called cut."""
    assert inline_output(output, b"", len(output), limits.INLINE_OUTPUT_MAX_BYTES) == (output.decode(), False)


def test_long_output_keeps_head_and_tail() -> None:
    """The first and the last bytes, with a line between them that says how much there was."""
    output = b"begin" + b"." * 100_000 + b"end"
    text, was_cut = inline_output(output[:1000], output[-1000:], len(output), 1000)
    assert was_cut
    assert text.startswith("begin...")
    assert text.endswith("...end")
    assert "\n... [remotegpu: output of 100008 bytes cut here] ...\n" in text
    assert 900 < len(text.encode()) <= 1000


def test_output_that_grows_by_replacement_is_cut() -> None:
    """One invalid byte becomes three: what fitted as bytes may not fit as text, and then its own end is kept."""
    output = b"begin" + b"\xff" * 900 + b"end"
    text, was_cut = inline_output(output, b"", len(output), 1000)
    assert was_cut
    assert (text[:5], text[-3:]) == ("begin", "end")
    assert len(text.encode()) <= 1000


def test_tail_that_cannot_be_read_is_not_made_up() -> None:
    """The head does not pose as the end of the output."""
    text, was_cut = inline_output(b"head", b"", 5000, 1000)
    assert was_cut
    assert text == "head\n... [remotegpu: output of 5000 bytes cut here] ...\n"


@property_test
@given(output=st.binary(max_size=600), limit=st.integers(0, 500))
@example(output=b"\0" * 70_000, limit=limits.INLINE_OUTPUT_MAX_BYTES)
@example(output=b"\xff" * 65_536, limit=limits.INLINE_OUTPUT_MAX_BYTES)
@example(output="\U0001f600".encode() * 20_000, limit=limits.INLINE_OUTPUT_MAX_BYTES)
def test_inline_output_obeys_its_bound(output: bytes, limit: int) -> None:
    """The text is within the bound as UTF-8 and without NUL, and the flag says whether it is whole."""
    head, tail = output[:limit], output[-limit:] if limit else b""
    text, was_cut = inline_output(head, tail if len(output) > limit else b"", len(output), limit)
    assert len(text.encode()) <= limit
    assert "\0" not in text
    assert was_cut == (text != clean_text(output))
