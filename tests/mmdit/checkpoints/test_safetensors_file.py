"""Our safetensors reader and writer agree with the safetensors library, and failed writes leave nothing behind."""

import os

import pytest
import safetensors.torch
import torch

from mmdit import CheckpointError
from mmdit.checkpoints import safetensors_io
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.safetensors_io import DTYPES, open_tensors, read_header, write_tensors


def sample(dtype, shape):
    """Tensors with any bit pattern; comparisons are of bytes."""
    size = torch.Size(shape).numel() * dtype.itemsize
    codes = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return codes.view(dtype).reshape(shape)


def everything():
    tensors = {f"w.{name}": sample(dtype, (3, 2)) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "b": torch.zeros(2), "a.10": torch.ones(1)}
    return tensors | {"ключ/鍵 \"'\\\n\t\x01\x7f": sample(torch.bfloat16, (5,)), "a.9": torch.ones(1)}


def lazy(tensors):
    return {key: LazyTensor.of(tensor) for key, tensor in tensors.items()}


def same(a, b):
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"ключ": '"\\\n'}], ids=str)
@pytest.mark.parametrize("tensors", [{"one": torch.ones(3)}, everything()], ids=["one", "all dtypes"])
def test_writes_the_bytes_that_the_library_writes(tmp_path, tensors, metadata):
    write_tensors(tmp_path / "ours.safetensors", lazy(tensors), metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == safetensors.torch.save(tensors, metadata)


def test_reads_what_the_library_reads(tmp_path):
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(everything(), path, {"format": "pt", "more": "é"})
    theirs, (ours, metadata) = safetensors.torch.load_file(path), open_tensors(path)
    assert metadata == {"format": "pt", "more": "é"}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert same(ours[key].read(), tensor), key
        assert ours[key].nbytes == tensor.nbytes
    assert same(ours["w.BF16"].read(torch.float64), theirs["w.BF16"].double())
    assert same(ours["scalar"].read(torch.float16), theirs["scalar"].half())
    assert ours["empty"].read(torch.float16).shape == (0, 4)


def test_a_cast_in_several_pieces_is_the_cast(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdit.checkpoints.safetensors_io.STAGING", 64)
    tensor = torch.randn(7, 19)
    write_tensors(tmp_path / "f.safetensors", lazy({"a": tensor}))
    assert same(open_tensors(tmp_path / "f.safetensors")[0]["a"].read(torch.bfloat16), tensor.bfloat16())


def test_header_of_640_bytes_is_no_pickle(tmp_path):
    """The length of the header has the first two bytes of a pickle."""
    path, tensor = tmp_path / "f.safetensors", torch.zeros(1)
    plain = safetensors.torch.save({"a": tensor}, {"pad": ""})
    extra = 640 - int.from_bytes(plain[:8], "little")
    safetensors.torch.save_file({"a": tensor}, path, {"pad": "x" * extra})
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_header(path).metadata == {"pad": "x" * extra}


@pytest.mark.parametrize("before", [None, b"what was there"], ids=["new", "old file"])
@pytest.mark.parametrize("error", [CheckpointError("source broke"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failed_write_changes_nothing(tmp_path, before, error):
    path = tmp_path / "folder" / "f.safetensors"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)

    def fail(dtype, device):
        assert [file for file in path.parent.iterdir() if file.name.startswith(".mmdit-")]
        raise error

    with pytest.raises(type(error)):
        write_tensors(path, lazy({"a": torch.ones(9)}) | {"b": LazyTensor((2,), torch.float32, fail)})
    assert [(file, file.read_bytes()) for file in path.parent.iterdir()] == ([(path, before)] if before else [])


@pytest.mark.parametrize("how", ["replaced", "written to", "touched"])
def test_a_file_that_changes_after_its_header_is_not_mixed(tmp_path, how):
    path = tmp_path / "f.safetensors"
    write_tensors(path, lazy({"a": torch.ones(8), "b": torch.ones(8)}))
    tensors, _ = open_tensors(path)
    assert tensors["a"].read().sum() == 8
    if how == "replaced":
        write_tensors(path, lazy({"a": torch.zeros(8), "b": torch.zeros(8)}))
    if how == "written to":
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"abcd")
    if how == "touched":
        os.utime(path, ns=(1, 1))
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(CheckpointError, match=r"f\.safetensors was replaced or written to"):
            tensors["b"].read(dtype)


def test_a_dtype_that_is_not_written_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"f\.safetensors: 'a' is torch\.float8_e8m0fnu"):
        write_tensors(tmp_path / "f.safetensors", lazy({"a": torch.zeros(2, dtype=torch.float8_e8m0fnu)}))
    assert not list(tmp_path.iterdir())


def test_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "f.safetensors"
    write_tensors(path, lazy({"a": torch.ones(8)}))
    tensors, _ = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"f\.safetensors was replaced or written to"):
        tensors["a"].read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_page_locked_buffers_are_waited_for_before_they_are_used_again(monkeypatch, tmp_path, dtype):
    """On a CPU that is treated as a GPU: an event per copy, and at most two copies that nobody has waited for."""
    said, under_way = [], set()

    class Event:
        def record(self, stream):
            assert self not in under_way, "a buffer is filled while it is copied"
            under_way.add(self)
            said.append(len(under_way))

        def synchronize(self):
            under_way.discard(self)

    empty = torch.empty

    def pageable(*size, pin_memory=False, **more):
        return empty(*size, **more)

    monkeypatch.setattr(torch, "empty", pageable)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    buffers = safetensors_io.Buffers(torch.device("cuda"), 64)
    monkeypatch.setattr(safetensors_io, "_own_buffers", lambda device: buffers)
    values = torch.randn(205).half()
    (tmp_path / "raw").write_bytes(values.numpy().tobytes())
    target = torch.zeros(205, dtype=dtype)
    with (tmp_path / "raw").open("rb") as file:
        safetensors_io._fill_through_buffers(tmp_path / "raw", file.fileno(), target, torch.float16)
    assert torch.equal(target, values.to(dtype))
    assert said == [1, *[2] * 6]
    assert not under_way
