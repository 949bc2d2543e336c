"""YAML as task files need it: no traps, no bombs, and each mistake with its place."""

from __future__ import annotations

import json
import math
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_schemas import limits
from remotegpu_schemas.problems import InvalidFile
from remotegpu_schemas.strict_yaml import Document, Plain, load, parse_scalar
from tests.schemas.support import property_test


def data(text: str | bytes) -> list[Plain]:
    """The documents as plain data."""
    raw = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
    return [document.data() for document in load(raw, "f.yaml")]


def problems(text: str | bytes) -> list[str]:
    """`line:column:length message` of every problem."""
    raw = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
    with pytest.raises(InvalidFile) as caught:
        load(raw, "f.yaml")
    return [f"{p.line}:{p.column}:{p.length} {p.message}" for p in caught.value.problems]


@pytest.mark.parametrize("char", ["\x7f", "\x80", "\x9f", "\ufffe", "\uffff", "\ufeff"])
def test_json_holds_characters_that_yaml_wants_escaped(char: str) -> None:
    """A JSON text is taken with every character that JSON allows, in keys and in values."""
    value = {f"key {char}": [f"{char}", f"\\{char}{char}"]}
    assert data(json.dumps(value, ensure_ascii=False).encode()) == [value]
    assert problems(f"a: b{char}".encode()) != []


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("+4", 4),
        ("0", 0),
        ("1.5", 1.5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("1" + "0" * 31, 1e31),
    ],
)
def test_plain_scalar_means_what_it_looks_like(text: str, value: object) -> None:
    """Decimal numbers, true and false, null."""
    (document,) = data(f"a: {text}")
    assert document == {"a": value}
    assert parse_scalar(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "no",
        "on",
        "off",
        "y",
        "n",
        "010",
        "0x1F",
        "0o17",
        "0b1",
        "1_000",
        "12:30",
        "2026-02-05",
        "1e",
        "e3",
        "tRue",
        "Infinity",
        "NaN",
        "1.2.3",
        "--5",
        ".",
        "v1",
        "10m",
        "==",
        "*.pt"[1:],
    ],
)
def test_everything_else_is_text(text: str) -> None:
    """None of the traps of YAML 1.1."""
    (document,) = data(f"a: {text}")
    assert document == {"a": text}


@pytest.mark.parametrize("text", ["12", "true", "null", "1.5", "~", ""])
def test_quoted_scalar_is_text(text: str) -> None:
    """Quotes always make text, in a file and in a setting."""
    assert data(f'a: "{text}"') == data(f"a: '{text}'") == data(f"a: !!str {text}") == [{"a": text}]
    assert parse_scalar(f'"{text}"') == text


def test_block_scalars_keep_their_lines() -> None:
    """A script is written as it is meant."""
    assert data("a: |\n  one\n  two\n") == [{"a": "one\ntwo\n"}]


def test_numbers_can_stay_as_they_are_written() -> None:
    """`1.10` as an argument is not 1.1."""
    (document,) = load(b"a: [1.10, 007, true]\nb: 1.10", "f.yaml")
    assert document.data(lambda path: path[:1] == ("a",)) == {"a": ["1.10", "007", True], "b": 1.1}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "---\n---\n", "\n\n", "\ufeff"])
def test_file_without_content_has_no_documents(text: str) -> None:
    """Empty files, comments only, empty documents."""
    assert data(text) == []


def test_documents_are_read_in_order() -> None:
    """Separated by `---`; anchors do not reach into the next."""
    assert data("a: 1\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]
    assert problems("a: &x 1\n---\nb: *x\n") == ["3:4:2 alias '*x' names nothing; '&x' must stand before it"]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "b"}',
        '{\n\t"a": "b"\n}',
        '{"a":"b"}',
        '\ufeff{"a": "b"}',
        '{"a" : "\\u0062"}',
    ],
)
def test_json_is_read(text: str) -> None:
    """With tabs, without blanks, with a byte order mark."""
    assert data(text) == [{"a": "b"}]


def test_json_escapes_beyond_the_bmp() -> None:
    """JSON writes them as two halves; a lone half is refused."""
    assert data(r'{"a": "\ud83d\ude00", "b": "\\ud83d", "c": "\/"}') == [{"a": "\U0001f600", "b": "\\ud83d", "c": "/"}]
    assert len(problems(r'{"a": "\ud83d"}')) == 1


def test_alias_repeats_what_it_names() -> None:
    """Anchors are allowed, within bounds."""
    assert data("a: &x [1, 2]\nb: *x\n") == [{"a": [1, 2], "b": [1, 2]}]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a: 1\nb: 2\na: 3\n", "3:1:1 duplicate key 'a'; it stands in line 1 already", id="duplicate"),
        pytest.param("{a: 1, 'a': 2}", "1:8:3 duplicate key 'a'; it stands in line 1 already", id="duplicate-quoted"),
        pytest.param("a:\n\tb: 1\n", "2:1:1 a tab cannot indent; use spaces", id="tab"),
        pytest.param("a:\n  \tb: 1\n", "2:3:1 a tab cannot indent; use spaces", id="tab-after-blanks"),
        pytest.param("1: a", "1:1:1 a key must be text; put it in quotes: '1'", id="key-number"),
        pytest.param("true: a", "1:1:4 a key must be text; put it in quotes: 'true'", id="key-bool"),
        pytest.param("? [a]\n: b", "1:3:3 a key must be text, not a list or a mapping", id="key-list"),
        pytest.param("?\n: b", "1:2:0 a key must be text; write one", id="key-missing"),
        pytest.param(
            "a: &x {b: 1}\nc:\n  <<: *x\n", "3:3:2 merge keys ('<<') are not supported; write the keys out", id="merge"
        ),
        pytest.param(
            "a: !!python/object:os.x 1",
            "1:4:22 the tag !!python/object:os.x is not supported; remove it",
            id="tag-python",
        ),
        pytest.param("a: !mine 1", "1:4:7 the tag !mine is not supported; remove it", id="tag-own"),
        pytest.param("a: !!int '1'", "1:4:9 the tag !!int is not supported; remove it", id="tag-int"),
        pytest.param("a: &x [*x]", "1:8:2 alias '*x' stands inside of what it names", id="alias-in-itself"),
        pytest.param("a: *x", "1:4:2 alias '*x' names nothing; '&x' must stand before it", id="alias-unknown"),
        pytest.param('a: "b\nc: d', "1:4:1 this quote is never closed", id="quote-open"),
        pytest.param("a: [b,\n  c", "1:4:1 this bracket is never closed", id="bracket-open"),
        pytest.param(
            "a: b: c", "1:5:1 a ':' is not possible here; put the text in quotes, or check the indentation", id="colon"
        ),
        pytest.param("a: @b", "1:4:1 a text cannot begin with '@'; put it in quotes", id="at-sign"),
        pytest.param("a: `b`", "1:4:1 a text cannot begin with '`'; put it in quotes", id="backtick"),
        pytest.param(b"a: caf\xe9", "1:7:1 byte 0xe9 is not UTF-8; save the file as UTF-8", id="latin-1"),
        pytest.param(
            b"\xef\xbb\xbfa: \xc3\xa9\n  \xff",
            "2:3:1 byte 0xff is not UTF-8; save the file as UTF-8",
            id="bad-utf-8-after-a-byte-order-mark",
        ),
        pytest.param("a: b".encode("utf-16"), "1:1:1 byte 0xff is not UTF-8; save the file as UTF-8", id="utf-16"),
        pytest.param(
            "x: 1\na: b\0c",
            "2:5:1 the character U+0000 is not allowed; remove it, or write it as \\x.. in quotes",
            id="nul",
        ),
        pytest.param(
            "a: \x1b[31m",
            "1:4:1 the character U+001B is not allowed; remove it, or write it as \\x.. in quotes",
            id="escape",
        ),
        pytest.param(
            "%YAML 9.9\n---\na: b", "1:1:1 this is not valid YAML: found incompatible YAML document", id="version"
        ),
    ],
)
def test_refused_with_its_place(text: str | bytes, expected: str) -> None:
    """Each mistake has line, column, length, and what to do."""
    assert problems(text) == [expected]


def test_all_mistakes_that_can_be_told_at_once() -> None:
    """Duplicates, keys and tags do not stop the reading."""
    assert [problem.split(" ")[0] for problem in problems("a: 1\na: 2\n3: 4\nb: !x 1\n")] == ["2:1:1", "3:1:1", "4:4:4"]


def test_nesting_is_bounded() -> None:
    """As deep as the bound is fine; one more is refused, and so are a hundred thousand."""
    depth = limits.YAML_MAX_DEPTH
    assert len(data("[" * (depth - 1) + "1" + "]" * (depth - 1))) == 1
    message = f"nested deeper than {depth} levels"
    assert problems("[" * depth + "1" + "]" * depth) == [f"1:{depth + 1}:1 {message}"]
    assert problems("[" * 100_000) == [f"1:{depth + 1}:1 {message}"]
    assert message in problems("{a: " * 100_000)[0]
    assert message in problems("- " * 100_000 + "a")[0]


def test_bomb_of_aliases_is_bounded() -> None:
    """A few lines that mean a hundred million values cost nothing."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]
    (problem,) = problems("\n".join(lines))
    assert problem.endswith("more than 100000 values in one file")


def test_aliases_are_bounded() -> None:
    """Small aliases are bounded by their number."""
    aliases = limits.YAML_MAX_ALIASES
    assert len(data("a: &a 1\nb: [" + "*a, " * aliases + "]")) == 1
    assert problems("a: &a 1\nb: [" + "*a, " * (aliases + 1) + "]")[0].endswith(f"more than {aliases} aliases")


def test_number_of_values_is_bounded() -> None:
    """Also without aliases, over all documents of a file."""
    assert problems("[" + "1," * limits.YAML_MAX_NODES + "]")[0].endswith("values in one file")
    assert problems("---\n[" + "1," * 60_000 + "]\n" + "---\n[" + "1," * 60_000 + "]\n")[0].endswith(
        "values in one file"
    )


def test_100_mb_are_refused_by_their_size() -> None:
    """Nothing of it is read."""
    (problem,) = problems(bytes(100 * limits.MIB))
    assert problem == "0:0:0 is larger than 1048576 bytes (104857600); is it the right file?"


# --- places --------------------------------------------------------------------------------------------------------


def test_places_of_keys_and_values() -> None:
    """A value's own place; the key's for a block, for nothing, and for what is not in the text."""
    (document,) = load(b"task:\n  args: [a, bcd]\n  env:\n    A: 1\n  name:\n", "f.yaml")
    assert document.value_mark(("task", "args", 1)) == document.key_mark(("task", "args", 1))
    mark = document.value_mark(("task", "args", 1))
    assert (mark.line, mark.column, mark.length) == (2, 13, 3)
    mark = document.value_mark(("task", "env"))
    assert (mark.line, mark.column, mark.length) == (3, 3, 3)
    mark = document.value_mark(("task", "name"))
    assert (mark.line, mark.column, mark.length) == (5, 3, 4)
    mark = document.value_mark(("task", "env", "missing", 3))
    assert (mark.line, mark.column) == (3, 3)
    mark = document.key_mark(("elsewhere",))
    assert (mark.line, mark.column) == (1, 1)


@property_test
@given(
    raw=st.binary(max_size=200)
    | st.text("ab:-[]{}&*!|>'\"#%@,? \n\t\\0x\u2028\x85\ufeff~.", max_size=80).map(str.encode)
)
def test_any_bytes_are_documents_or_a_report(raw: bytes) -> None:
    """Nothing but InvalidFile is ever raised, and each problem has a place in the text."""
    loaded = _loaded(raw)
    if isinstance(loaded, InvalidFile):
        assert loaded.problems
        assert all(problem.line >= 1 and problem.column >= 1 and problem.length >= 0 for problem in loaded.problems)
        assert str(loaded).endswith("; nothing was done.")
    else:
        assert all(document.data() is not None or document.lines for document in loaded)


def _loaded(raw: bytes) -> list[Document] | InvalidFile:
    try:
        return load(raw, "f.yaml")
    except InvalidFile as error:
        return error


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(max_size=10),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6).filter("<<".__ne__), children, max_size=3)
    ),
    max_leaves=10,
)


@property_test
@given(value=st.lists(plain) | st.dictionaries(st.text(max_size=80).filter("<<".__ne__), plain))
def test_any_json_is_read_back(value: object) -> None:
    """JSON as Python writes it (ASCII, halves of pairs) means the same here; keys are below YAML's 1024 characters."""
    assert data(json.dumps(value).encode()) == [value]
