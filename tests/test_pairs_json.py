"""JSON documents through a small window: the rows, places and errors of the whole text."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_kit.errors import InputError
from dpo_kit.pairs import json_rows, reading
from dpo_kit.pairs.json_rows import rows_of_document
from dpo_kit.pairs.reading import rows_of_file

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5)


def parts_of(text: str, length: int) -> Iterator[str]:
    return (text[at : at + length] for at in range(0, len(text), length))


def outcome(text: str, window: int) -> tuple[list, str | None]:
    """The rows with their places as text, which NaN is equal in, and the error that they end with."""
    before, json_rows.WINDOW = json_rows.WINDOW, window
    found: list[str] = []
    try:
        for row in rows_of_document("f", parts_of(text, window)):
            found.append(str(row))
        return found, None
    except InputError as error:
        return found, str(error)
    finally:
        json_rows.WINDOW = before


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Lists of rows, some of them cut, or with something put in, or put into an object."""
    rows, indent = draw(ROWS), draw(st.sampled_from([None, 0, 1]))
    text = json.dumps(rows, indent=indent, ensure_ascii=draw(st.booleans()))
    text = draw(st.sampled_from(["{}", "\n {}\r\n", '{{"data": {}}}', "{}]", "{} 1"])).format(text)
    damage = draw(st.sampled_from(["none", "cut", "put in"]))
    at = draw(st.integers(0, len(text)))
    if damage == "cut":
        return text[: max(1, at)]
    put_in = draw(st.sampled_from(['"', "\\", "\\ud8", ",", "1.5e+", "-", "tru", "NaN", "[", "}", "\n", "x"]))
    return text if damage == "none" else text[:at] + put_in + text[at:]


@settings(max_examples=400)
@given(text=documents(), window=st.integers(9, 20))
@example(text="[{}, 12.5e3, 1]", window=9)
@example(text="[{}, " + "1" * 5000 + "]", window=1000)
@example(text='[{"a": ' + "1" * 5000 + ".5}]", window=1000)
@example(text="[{}, " + "[" * 3000, window=9)
@example(text='[{"a": 1, "a": 2}, x]', window=9)
def test_what_a_window_sees_is_what_json_sees(text: str, window: int) -> None:
    rows, error = outcome(text, window)
    assert (rows, error) == outcome(text, max(1, len(text)))
    try:
        whole: Any = json.loads(text)
    except json.JSONDecodeError as broken:
        whole, said = None, f"f:{broken.lineno}: broken JSON: {broken.msg} at column {broken.colno}"
    except (ValueError, RecursionError):
        whole, said = None, ""
    if whole is None:
        assert error is not None
        assert error.startswith(said) or "broken JSON" not in error
    elif isinstance(whole, list) and error is None:
        assert [row.rpartition(", Place(")[0][1:] for row in rows] == list(map(str, whole))


@pytest.fixture
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "WINDOW", 9)
    monkeypatch.setattr(reading, "WINDOW", 9)


def read(path: Path, content: bytes) -> list:
    path.write_bytes(content)
    return list(rows_of_file(str(path)))


@pytest.mark.usefixtures("small_window")
@pytest.mark.parametrize("before", ["", "\ufeff", "\n \u2003 \n", "\ufeff" + " " * 9, "\ufeff\n"])
def test_characters_cut_at_the_end_of_a_part(tmp_path: Path, before: str) -> None:
    rows = [{"aé": "é€😀\ufeff" * 3, "b": i} for i in range(5)]
    text = before + json.dumps(rows, ensure_ascii=False) + " \n \n"
    found = read(tmp_path / "a.json", text.encode())
    assert [row for row, _ in found] == rows
    assert {place.line for _, place in found} == {before.count("\n") + 1}
    assert read(tmp_path / "a.json.gz", gzip.compress(text.encode()))[4][0] == rows[4]
    with pytest.raises(
        InputError, match=f"Extra data at column {len(text.split(chr(10))[-3].strip(chr(0xFEFF))) + 1}"
    ):
        read(tmp_path / "a.json", (before + json.dumps(rows, ensure_ascii=False) + " x").encode())


@pytest.mark.usefixtures("small_window")
def test_a_byte_that_is_not_utf8_is_named_by_its_place_in_the_line(tmp_path: Path) -> None:
    start = '[\n{"aé": "é€😀"},\n'.encode()
    for line in ('{"aé": "é€'.encode(), b"", b"  {"):
        for bad in (b"\xe9", b"\xe2\x82", b"\xf0\x9f\x98"):
            with pytest.raises(
                InputError, match=rf"byte {len(line) + 1} of the line \(0x{bad[0]:02x}\)"
            ) as found:
                read(tmp_path / "a.json", start + line + bad + b'"}]')
            assert found.value.line == 3
            with pytest.raises(InputError, match=rf"byte {len(line) + 1} of the line \(0x{bad[0]:02x}\)"):
                read(tmp_path / "a.json", start + line + bad)


def test_a_list_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "WINDOW", 1 << 14)
    monkeypatch.setattr(reading, "WINDOW", 1 << 14)
    for indent in (None, 1):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"prompt": "p" * 500, "chosen": "a"}] * 5000, indent=indent))
        tracemalloc.start()
        count = sum(1 for _ in rows_of_file(str(path)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 5000
        assert peak < path.stat().st_size / 10


def test_a_long_row_is_tried_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, text: str, at: int = 0) -> tuple[Any, int]:
            tried.append(len(text) - at)
            return super().raw_decode(text, at)

    monkeypatch.setattr(json_rows, "_DECODER", Counting())
    rows = [{"a": "x" * 1_000_000}, {"a": ["y"] * 200_000}, {"b": 1}]
    text = json.dumps(rows)
    assert [row for row, _ in rows_of_document("f", parts_of(text, 1000))] == rows
    monkeypatch.setattr(json_rows, "WINDOW", 1000)
    tried.clear()
    assert [row for row, _ in rows_of_document("f", parts_of(text, 1000))] == rows
    assert sum(tried) < 5 * len(text)
