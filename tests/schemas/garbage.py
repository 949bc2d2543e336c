"""Structured garbage: what peers and people send, with a few slips in it. All JSON values, by hypothesis."""

from __future__ import annotations

import copy
import json
from typing import Any, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.scale import scaled
from tests.schemas.support import json_values

SLIPS_MAX: Final = 4


def fuzz(long: int) -> settings:
    """How many examples a test tries in `make test-long`; `test_garbage.py` says how many they must be together."""
    return settings(
        deadline=None, print_blob=True, max_examples=scaled(60, long), suppress_health_check=[HealthCheck.too_slow]
    )


EDGES: Final[tuple[Any, ...]] = (
    *(
        None,
        True,
        False,
        "",
        " ",
        "\0",
        "\ud800",
        "\ufffe",
        "\x7f",
        "\x85",
        "é" * 300,
        "x" * 2001,
        "=",
        "a=b",
        "{{ vars.x }}",
    ),
    *(0, -1, 1, 10, 11, 64, 65, 255, 256, 1000, 1001, 2**31, 2**53, 2**63, 2**64, 10**30, 10**128, -(10**40)),
    *(0.0, -0.0, 0.5, 1e-320, 1e15, 1e16, 1e300, float("inf"), float("-inf"), float("nan")),
    *("0", "1", "-1", "010", "0x1F", "1e3", "1_000", "12:30", "yes", "null", "~", "NaN", "9" * 400),
    *("90s", "10m", "24h", "7d", "366d", "367d", "-1s", "1.5h", "1.1234567890s", "90 s", "1y"),
    *("SIGTERM", "sigint", "USR1", "SIGKILL", "SIG_DFL", "SIGNAL", "shell", "container", "exponential", "exit_code"),
    *(
        "2026-02-05T12:00:00.123456789Z",
        "2026-02-05T12:00:00+23:59",
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:60-23:59",
    ),
    *("0000-00-00T00:00:00Z", "Thu, 05 Feb 2026 12:00:00 GMT", "300", "30001", "../../etc", "a/b", "t" * 129),
    *(
        "[]",
        "{}",
        "[1, null, {}]",
        '{"A": "b"}',
        '"x"',
        "[" * 200,
        "https://store.example/key",
        "https://[::1",
        "http://:0/",
    ),
    *([], {}, [[]], [None], {"": ""}, {"a": None}, {"\0": "\0"}, [{}] * 70, {str(number): "" for number in range(70)}),
)
"""Values at the bounds, and in the other spellings that somebody may think of."""

odd_values: Final = st.sampled_from(EDGES) | json_values


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each container with each of its keys or indexes, the outermost first."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop(0)
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        found += [(node, key) for key in keys]
        todo += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found


@st.composite
def near(draw: st.DrawFn, valid: Any, keys: tuple[str, ...] = ("bogus",)) -> Any:
    """A valid form with up to SLIPS_MAX slips; `keys` are further names that it might have."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, SLIPS_MAX))):
        places = _places(value)
        if not places:
            break
        node, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "drop", "wrap", "encode", "spell", "move", "add"])):
            case "replace":
                node[key] = copy.deepcopy(draw(odd_values))
            case "drop":
                del node[key]
            case "wrap":
                node[key] = draw(st.sampled_from([[node[key]], {"value": node[key]}, [node[key], node[key]]]))
            case "encode":
                node[key] = json.dumps(node[key])
            case "spell":
                node[key] = str(node[key])
            case "move" if isinstance(node, dict):
                node[draw(st.sampled_from(keys) | st.text(max_size=8))] = node.pop(key)
            case _ if isinstance(node, dict):
                node[draw(st.sampled_from(keys) | st.text(max_size=8))] = copy.deepcopy(draw(odd_values))
            case _:
                node.append(copy.deepcopy(draw(odd_values)))
    return value


def as_json(value: Any) -> bytes:
    """As a careless peer writes it: NaN, infinities and halves of surrogate pairs included."""
    return json.dumps(value).encode()


def as_raw_json(value: Any) -> bytes:
    """The same with every character as it is."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


encoded: Final = st.sampled_from([as_json, as_raw_json])

cut_bytes: Final = st.tuples(st.integers(0, 4000), st.binary(max_size=6))


def with_cut(raw: bytes, cut: tuple[int, bytes]) -> bytes:
    """The bytes with a few of them overwritten; mostly none, because the place is behind the end."""
    at, piece = cut
    return raw[:at] + piece + raw[at + len(piece) :] if at < len(raw) else raw
