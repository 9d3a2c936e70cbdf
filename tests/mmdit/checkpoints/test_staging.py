"""Tensors read in large pieces, as for a GPU: here to a CPU, through buffers so small that pieces cut tensors."""

import os
import time
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event

import pytest
import torch
from jaxtyping import config

from mmdit.bench.cold import cut, read_part
from mmdit.bench.loading import random_tensors
from mmdit.checkpoints import load, staging
from mmdit.checkpoints.float8 import metadata_in, spelled
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.load import build, open_model
from mmdit.checkpoints.locate import locate
from mmdit.checkpoints.safetensors_io import CheckpointError, open_tensors, write_tensors
from mmdit.checkpoints.staging import filled, pieces, runs
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from quant.recipe import RECIPES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def values():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 19), "b": (), "c": (0, 3), "d": (1,), "e": (300,), "f": (3, 5, 2)}
    found = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    found |= {f"half {key}": one.half() for key, one in found.items()}
    return found | {"codes": found["e"].to(torch.float8_e5m2), "flags": found["e"] > 0}


@pytest.fixture(scope="module")
def files(values, tmp_path_factory):
    """The values in two files; keys of the second one end with a prime."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name, mark in (("1", ""), ("2", "'")):
        write_tensors(folder / f"{name}.safetensors", {key: LazyTensor.of(one) for key, one in values.items()})
        opened = open_tensors(folder / f"{name}.safetensors")[0]
        found |= {key + mark: lazy.load for key, lazy in opened.items()}
    return found


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("size", [1, 64, 1000, 2**20])
def test_tensors_are_those_of_the_files(files, values, readers, size):
    with torch.inference_mode(), filled(files, CPU, readers=readers, size=size) as found:
        assert found.keys() == files.keys()
    for key, one in found.items():
        wanted = values[key.removesuffix("'")]
        assert one.dtype == wanted.dtype
        assert torch.equal(one.view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8)), key
        assert not one.is_inference()


@pytest.mark.parametrize("size", [1, 64, 1000, 2**20])
def test_pieces_hold_every_byte_once_and_nothing_else(files, size):
    found = pieces(files, size)
    assert all(0 < piece.stop - piece.start == sum(part.size for part in piece.parts) <= size for piece in found)
    for key, tensor in files.items():
        spans = [
            (part.begin, piece.start + part.offset, part.size)
            for piece in found
            if piece.header is tensor.header
            for part in piece.parts
            if part.key == key
        ]
        assert all(at - begin == tensor.entry.start for begin, at, _ in spans)
        ends = [0, *(begin + length for begin, _, length in spans)]
        assert ends == [*(begin for begin, _, _ in spans), tensor.entry.stop - tensor.entry.start]


@pytest.mark.parametrize("size", [1, 100, 10**6])
def test_runs_are_neighbouring_pieces(files, size):
    found = pieces(files, 64)
    together = runs(found, size)
    assert [piece for run in together for piece in run] == found
    sizes = [[piece.stop - piece.start for piece in run] for run in together]
    assert all(sum(run[:-1]) < size for run in sizes) and all(sum(run) >= size for run in sizes[:-1])


def test_parts_of_a_file_hold_every_tensor_once(files):
    wanted = {key: one for key, one in files.items() if not key.endswith("'")}
    parts = cut(wanted, 3)
    assert all(parts) and sorted(key for part in parts for key in part) == sorted(wanted)
    stops = [max(one.entry.stop for one in part.values()) for part in parts]
    assert all(one.entry.start >= stop for part, stop in zip(parts[1:], stops, strict=False) for one in part.values())


def test_only_what_is_asked_for_is_read(files, values):
    some = {key: files[key] for key in ("e", "half a")}
    assert sum(piece.stop - piece.start for piece in pieces(some)) == 300 * 4 + 7 * 19 * 2
    with filled(some, CPU) as found:
        pass
    assert torch.equal(found["half a"], values["half a"])


@pytest.mark.parametrize("how", ["shorter", "touched before", "touched meanwhile"])
def test_a_file_that_changes_is_an_error(tmp_path, monkeypatch, how):
    path = tmp_path / "f.safetensors"
    write_tensors(path, {key: LazyTensor.of(torch.ones(100)) for key in "ab"})
    wanted = {key: lazy.load for key, lazy in open_tensors(path)[0].items()}
    if how == "shorter":
        os.truncate(path, path.stat().st_size - 4)
    if how == "touched before":
        os.utime(path, ns=(1, 1))
    if how == "touched meanwhile":
        read = staging.read_into
        monkeypatch.setattr(staging, "read_into", lambda *args: (read(*args), os.utime(path, ns=(1, 1))))
    with pytest.raises(CheckpointError, match=r"f\.safetensors was replaced or written to"):  # noqa: SIM117
        with filled(wanted, CPU, size=64, readers=2):
            pass


def test_an_error_inside_ends_the_reading(files, monkeypatch):
    read = []
    monkeypatch.setattr(staging, "read_into", lambda path, file, memory: read.append(len(memory)))
    with pytest.raises(KeyError), filled(files, CPU, size=1, readers=2):
        raise KeyError("stop")
    assert len(read) < sum(piece.stop - piece.start for piece in pieces(files))


def test_an_error_before_the_first_piece_ends_the_reading(files, monkeypatch):
    """Page-locking fails in the second thread: the first one, whose end is waited for, stops too."""
    made, read, buffers = [], [], staging.Buffers
    failed = Event()

    class Failing(buffers):
        def __init__(self, *args):
            made.append(self)
            if len(made) == 2:
                failed.set()
                raise RuntimeError("page-locking")
            super().__init__(*args)

    def slowly(path, file, memory):
        assert failed.wait(10)
        time.sleep(1e-3)
        read.append(len(memory))

    monkeypatch.setattr(staging, "Buffers", Failing)
    monkeypatch.setattr(staging, "read_into", slowly)
    with pytest.raises(RuntimeError, match="page-locking"), filled(files, CPU, size=1, readers=2):
        pass
    assert len(read) < sum(piece.stop - piece.start for piece in pieces(files)) // 8


def test_a_part_that_reaches_beyond_the_file_is_no_measurement(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    read_part(path, (10, 100), locked=False)
    with pytest.raises(CheckpointError, match="f ended"):
        read_part(path, (10, 101), locked=False)


@pytest.mark.parametrize("how", ["codes", "quantized", "as it is", "cast"])
def test_a_model_read_in_pieces_is_the_model(tmp_path, monkeypatch, how):
    with torch.device("meta"):
        shapes = MMDiT(MMDiTConfig(2, 64, 48, 24, 8, head_dim=16, sample_size=4))
    recipe = RECIPES["fp8"]
    tensors = random_tensors(shapes, recipe if how == "codes" else None, torch.bfloat16)
    path = tmp_path / "model.safetensors"
    write_tensors(path, spelled(tensors, "comfyui"), metadata_in(tensors, "comfyui"))
    recipe = recipe if how == "quantized" else None
    stored = open_model(locate(path), "transformer")
    dtype = torch.float32 if how == "cast" else None
    wanted = build(stored, "cpu", dtype, recipe=recipe).state_dict()
    taken = []
    monkeypatch.setattr(load, "_IN_PIECES", ("cpu",))
    monkeypatch.setattr(load, "filled", lambda tensors, device: taken.append(set(tensors)) or filled(tensors, device))
    found = build(stored, "cpu", dtype, recipe=recipe).state_dict()
    assert list(found) == list(wanted)
    assert all(type(one) is type(wanted[key]) and torch.equal(one, wanted[key]) for key, one in found.items())
    linears = {key for key, one in wanted.items() if hasattr(one, "qdata")}
    assert taken == [{"cast": set(), "quantized": wanted.keys() - linears}.get(how, set(wanted))]


def test_threads_copy_on_streams_of_their_own_after_what_used_the_memory(files, monkeypatch):
    order, ready, buffers = [], object(), staging.Buffers

    class Stream:
        def __init__(self, device):
            order.append(("made", device))

        def wait_event(self, event):
            order.append(("waits", event))

    @contextmanager
    def current(stream):
        order.append(("enters", type(stream)))
        yield
        order.append(("leaves", type(stream)))

    class Copied(buffers):
        def copied(self, i):
            order.append(("copied", i))
            super().copied(i)

    monkeypatch.setattr(config, "jaxtyping_disable", True)  # a real event takes a GPU
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(staging, "Buffers", Copied)
    some, work = {key: files[key] for key in "ae"}, SimpleQueue()
    work.put(pieces(some, 1000))
    targets = {key: torch.zeros(one.entry.stop - one.entry.start, dtype=torch.uint8) for key, one in some.items()}
    staging._read(work, targets, CPU, 1000, ready, Event())
    before, after = [("made", CPU), ("waits", ready), ("enters", Stream)], [("leaves", Stream)]
    assert order == before + [("copied", i) for i in range(len(pieces(some, 1000)))] + after
    assert all(target.any() for target in targets.values())
