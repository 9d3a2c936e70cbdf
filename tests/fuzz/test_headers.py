"""Headers of safetensors files: every input is read, or refused by our own error, and soon."""

import json
import struct

import pytest
import torch
from safetensors.torch import save

from fuzzing import cases, mutated, survives
from mmdit import CheckpointError
from mmdit.checkpoints.safetensors_io import MAX_HEADER, MAX_TENSORS, read_header, write_tensors
from refusals import refuses

VALID = save({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.float16), "c": torch.zeros(0, 5)}, {"m": "n"})


def parts(data: bytes) -> tuple[bytes, bytes]:
    """Header and data of a file."""
    length = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + length], data[8 + length :]


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def read_all(path):
    for lazy in read_header(path).tensors().values():
        lazy.read()
        lazy.read(torch.float64)


def test_generated_headers(tmp_path):
    path, (header, data) = tmp_path / "f.safetensors", parts(VALID)
    read = refused = 0
    for seed, random in cases(100):
        match random.randrange(4):
            case 0:  # bytes
                broken = bytearray(VALID)
                for _ in range(random.choice((1, 1, 2, 8))):
                    broken[random.randrange(len(broken))] = random.randrange(256)
            case 1:  # lengths
                broken = bytearray(
                    VALID[: random.randrange(len(VALID) + 1)] + random.randbytes(random.choice((0, 1, 9)))
                )
            case 2:  # text
                place = random.randrange(len(header))
                more = random.choice((b"[" * 3000, b"9" * 6000, b"\xff", b'"', b'{"a":1,"a":2}', b"NaN", b" " * 500))
                broken = bytearray(with_header(header[:place] + more + header[place:], data))
            case _:  # values
                value = json.loads(header)
                for _ in range(random.choice((1, 1, 2, 4))):
                    value = mutated(value, random)
                broken = bytearray(with_header(json.dumps(value).encode(), data))
        path.write_bytes(broken)
        succeeded = survives(lambda: read_all(path), (CheckpointError,), seed)
        read, refused = read + succeeded, refused + (not succeeded)
    assert refused
    assert read, "a generator that breaks everything tries little"


ENTRY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
# Every input that ever failed: with which error of Python's, or after how long.
REGRESSIONS = {
    "sides that overflow beside 0 (RuntimeError)": json.dumps({"a": ENTRY | {"shape": [0, 2**62, 2**31]}}),
    "strides that overflow (RuntimeError)": json.dumps({"a": ENTRY | {"shape": [0, 2**62, 2**62]}}),
    "shape of 100,000 numbers (57 s)": json.dumps({"a": ENTRY | {"shape": [2**62] * 100_000 + [0]}}),
    "shape that is a text (read as a scalar)": json.dumps({"a": ENTRY | {"shape": "", "data_offsets": [0, 4]}}),
    "shape that is an object": json.dumps({"a": ENTRY | {"shape": {}, "data_offsets": [0, 4]}}),
    "duplicate keys of 389 KB (22 s)": "{" + ",".join(f'"{i % 20000}":1' for i in range(40_000)) + "}",
    "deep nesting (RecursionError)": '{"a":' * 5000,
    "endless integer (ValueError)": '{"a":' + "9" * 5000 + "}",
    "half a character": '{"\\ud800": {}}',
    "dtype that is a list": json.dumps({"a": ENTRY | {"dtype": [[]]}}),
    "metadata in metadata": json.dumps({"__metadata__": {"a": {}}}),
    "a long name": json.dumps({"x" * 10**6: 1}),
}


@pytest.mark.parametrize("case", REGRESSIONS)
def test_inputs_that_once_failed(tmp_path, case):
    path = tmp_path / "f.safetensors"
    path.write_bytes(with_header(REGRESSIONS[case].encode(), bytes(4) if "text" in case or "object" in case else b""))
    assert not survives(lambda: read_all(path), (CheckpointError,), case)
    assert len(refuses(lambda: read_header(path), path)) < 1500


def test_many_tensors_are_refused_before_they_are_parsed(tmp_path):
    path, entry = tmp_path / "f.safetensors", json.dumps(ENTRY)
    for count, is_read in ((MAX_TENSORS + 1, False), (20_000, True)):
        path.write_bytes(with_header(("{" + ",".join(f'"k{i}":{entry}' for i in range(count)) + "}").encode()))
        assert survives(lambda: read_header(path), (CheckpointError,), count) is is_read


def test_valid_headers_that_were_refused(tmp_path):
    """A header may begin with spaces, also where its length begins like the magic of another format."""
    path, (header, data) = tmp_path / "f.safetensors", parts(VALID)
    for extra in range(1, 257):
        path.write_bytes(with_header(b" \n\t\r"[extra % 4 :][:1] * extra + header.rstrip(b" "), data))
        assert set(read_header(path).entries) == {"a", "b", "c"}


def test_what_is_written_can_be_read(tmp_path):
    from mmdit.checkpoints.lazy import LazyTensor

    tensors = {"a": LazyTensor.of(torch.ones(2))}
    with pytest.raises(ValueError, match=str(MAX_HEADER)):
        write_tensors(tmp_path / "f", tensors, {"big": "x" * MAX_HEADER})
    assert not list(tmp_path.iterdir())
