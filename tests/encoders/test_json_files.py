"""The strict JSON reader: what it takes, what it refuses, and that refusing costs little."""

import json
import os
import time
from pathlib import Path

import pytest

from encoders.json_files import MAX_BYTES, MAX_DEPTH, JSONError, parse_json, read_json

VALID = [
    *(b"{}", b"[]", b" null\n", b"true", b'"a"', b"-1.5e-3", b'{"a": [1, {"b": null}]}', b'"\\ud83d\\ude00"'),
    *('"ü"'.encode(), b'"[[[[\\"[[[["', b'"\\\\"', b"340282366920938463463374607431768211456", b"1e-400"),
    b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
    b'["' + b"[" * 1000 + b'\\\\\\"' + b"[" * 1000 + b'"]',
]


@pytest.mark.parametrize("data", VALID, ids=lambda data: repr(data[:20]))
def test_valid_texts_are_read_as_python_reads_them(data: bytes) -> None:
    assert parse_json(data, "a.json") == json.loads(data)
    assert parse_json(data.decode("utf-8"), "a.json") == json.loads(data)


REFUSED = [
    (b"", "empty"),
    (b" \n", "empty"),
    (b"{", "line 1, column 2"),
    (b'{"a": 1,}', "line 1, column"),
    (b"[1]\n[2]", "line 2, column 1"),
    (b'{"a": NaN}', "NaN"),
    (b"[Infinity]", "Infinity"),
    (b"-Infinity", "-Infinity"),
    (b"1e999", "1e999"),
    (b"-1" + b"0" * 400 + b".0", "too large"),
    (b"1" * 5000, "5000 digits"),
    (b"-" + b"1" * 42, "43 digits"),
    (b'{"a": 1, "b": 2, "a": 3}', "'a'"),
    (b'[[{"x": {"a": 1, "a": 1}}]]', "'a'"),
    (b'{"a": "\xff"}', "UTF-8"),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    ("{}".encode("utf-16"), "UTF-16"),
    ("{}".encode("utf-16-be"), "line 1, column 1"),
    (b'"\\ud800"', "UTF-8"),
    (b'{"\\udc00a": 1}', "UTF-8"),
    (b'"a\nb"', "line 1, column"),
    (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"{MAX_DEPTH} deep"),
    (b'{"a":' * 100_000, f"{MAX_DEPTH} deep"),
    (b"<!DOCTYPE html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    (b" " * (MAX_BYTES + 1), f"{MAX_BYTES} bytes"),
]


@pytest.mark.parametrize(("data", "found"), REFUSED, ids=lambda value: repr(value[:20]))
def test_what_is_refused_is_said_with_the_name_of_the_file(data: bytes, found: str, tmp_path: Path) -> None:
    with pytest.raises(JSONError) as caught:
        parse_json(data, "folder/a.json")
    assert "folder/a.json" in str(caught.value) and found in str(caught.value)
    assert len(str(caught.value)) < 300
    (tmp_path / "b.json").write_bytes(data)
    with pytest.raises(JSONError, match=r"b\.json"):
        read_json(tmp_path / "b.json")


def test_a_string_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(JSONError, match="UTF-8"):
        parse_json('"\ud800"', "a.json")


@pytest.mark.parametrize(("data", "found"), [(b"[1]", "array"), (b"null", "null"), (b'"x\x7f"', r'"x\\x7f"')])
def test_the_outermost_value_is_of_the_kind_asked_for(data: bytes, found: str) -> None:
    with pytest.raises(JSONError, match=f"a.json.*{found}.*an object"):
        parse_json(data, "a.json", kind=dict)


def test_the_limits_are_arguments() -> None:
    assert parse_json(b"[[1]]", "a.json", max_bytes=5, max_depth=2) == [[1]]
    with pytest.raises(JSONError, match="4 bytes"):
        parse_json(b"[[1]]", "a.json", max_bytes=4)
    with pytest.raises(JSONError, match="1 deep"):
        parse_json(b"[[1]]", "a.json", max_depth=1)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for name in ("missing", "loop", "pipe", ".", "a\0b", "x" * 300):
        with pytest.raises(JSONError):
            read_json(tmp_path / name)


def test_control_characters_of_a_name_are_escaped() -> None:
    with pytest.raises(JSONError) as caught:
        parse_json(b"{", "a\x1b[2J\n.json")
    assert str(caught.value).startswith(r"a\x1b[2J\n.json")


HARD = {
    "arrays": b"[" + b"[]," * 300_000 + b"[]]",
    "quotes": b'"' + b'\\"' * 500_000,
    "open strings": b'"' * 1_000_000,
    "backslashes": b'"' + b"\\" * 1_000_000,
    "one key": b"{" + b'"a":1,' * 170_000 + b'"a":1}',
    "digits": b"9" * 1_000_000,
    "fraction": b"1." + b"9" * 1_000_000,
    "exponent": b"1e-" + b"9" * 1_000_000,
}


@pytest.mark.parametrize("data", HARD.values(), ids=HARD)
def test_a_megabyte_of_anything_takes_a_moment(data: bytes) -> None:
    started = time.process_time()
    try:
        parse_json(data, "a.json")
    except JSONError as error:
        assert len(str(error)) < 300
    assert time.process_time() - started < 3
