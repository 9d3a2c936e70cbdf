"""Folders of pictures and captions: what is read, cached and drawn, and the message of everything that is wrong."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdit.checkpoints.safetensors_io import open_tensors
from mmdit.training import data as module
from mmdit.training.batches import InMemory, batch_at, draw, members_at, order
from mmdit.training.config import TrainingConfig
from mmdit.training.data import encoded, fitted
from mmdit.training.records import DataError, Size, bucket_of, bucket_sizes, read_records
from tiny_training import demo, samples, settings, write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def folder(pictures, tmp_path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "data"))


def config(folder: Path, output: Path, **more: object) -> TrainingConfig:
    small = {"data": str(folder), "size": 64, "multiple": 16, "text_tokens": 77}
    return settings(output, **(small | more))


def test_captions_in_text_json_and_a_table_are_the_same(folder: Path) -> None:
    texts = [one.caption for one in read_records(folder)]
    assert all(texts)
    (folder / "1.txt").unlink()
    (folder / "1.json").write_text(json.dumps({"caption": texts[1], "seed": 3}))
    assert [one.caption for one in read_records(folder)] == texts
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    assert [(one.picture.name, one.caption) for one in read_records(folder)] == [
        (f"{i}.png", text) for i, text in enumerate(texts)
    ]


def spoil(folder: Path, what: str) -> None:
    match what:
        case "no folder":
            shutil.rmtree(folder)
        case "empty":
            for path in folder.iterdir():
                path.unlink()
        case "picture without caption":
            (folder / "1.txt").unlink()
        case "caption without picture":
            (folder / "1.png").unlink()
        case "two captions":
            (folder / "1.json").write_text('{"text": "a"}')
        case "two pictures":
            shutil.copy(folder / "1.png", folder / "1.webp")
        case "not utf-8":
            (folder / "1.txt").write_bytes(b"\xff\xfe1")
        case "table line":
            (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name"\n')
        case "table caption":
            (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "txt": "a"}\n')
        case "table file":
            (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}\n')
        case "table outside":
            (folder / "metadata.jsonl").write_text('{"file_name": "../9.png", "text": "a"}\n')
        case "table twice":
            (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' * 2)


@pytest.mark.parametrize(
    ("what", "facts"),
    {
        "no folder": "data",
        "empty": "holds no picture",
        "picture without caption": r"1\.png has no caption.*1\.txt",
        "caption without picture": r"1\.txt.*without a picture.*1\.png",
        "two captions": r"1\.png.*1\.txt and 1\.json",
        "two pictures": r"/1: two pictures",
        "not utf-8": r"1\.txt.*UTF-8",
        "table line": r"metadata\.jsonl, line 2",
        "table caption": r"line 1 has the keys.*'txt'",
        "table file": r"line 1: file_name '9\.png'.*without a picture",
        "table outside": r"line 1: file_name '\.\./9\.png' leads out",
        "table twice": r"line 2: 0\.png occurs twice",
    }.items(),
)
def test_bad_folders(what: str, facts: str, folder: Path) -> None:
    spoil(folder, what)
    with pytest.raises(DataError, match=facts):
        read_records(folder)


def test_hints_are_found_and_missed(folder: Path) -> None:
    with pytest.raises(DataError, match=r"0\.png has 0 hints.*hints/0\.png"):
        read_records(folder, hints=True)
    (folder / "hints").mkdir()
    for path in folder.glob("*.png"):
        shutil.copy(path, folder / "hints")
    assert [one.hint for one in read_records(folder, hints=True)] == sorted((folder / "hints").iterdir())


def test_a_picture_that_does_not_open(folder: Path, tmp_path: Path) -> None:
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"2\.png does not open"):
        encoded(demo(), config(folder, tmp_path / "out"))


def test_everything_is_encoded_once(folder: Path, tmp_path: Path, monkeypatch) -> None:
    settings = config(folder, tmp_path / "out")
    found = encoded(demo(), settings)
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cache").rglob("*.safetensors")}
    assert len(cached) == 3 + 4
    assert {shape[1:] for shape in found.shapes} <= {(size.height // 8, size.width // 8) for size in _sizes(settings)}
    one = found.read(1)
    wanted = demo().vae.encode(2 * module.opened(folder / "1.png")[:, :, ::2, ::2] - 1).mean
    assert one.mean.shape == wanted.shape[1:]
    text = demo().encode([found.samples[1].record.caption], max_sequence_length=77)
    assert torch.equal(one.context, text.context[0])
    assert torch.equal(found.empty[1], demo().encode([""], max_sequence_length=77).pooled[0])
    monkeypatch.setattr(module, "_moments", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(module, "_text", lambda *_: pytest.fail("encoded again"))
    assert [one.latent for one in encoded(demo(), settings).samples] == [one.latent for one in found.samples]
    assert {path: path.stat().st_mtime_ns for path in cached} == cached
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(pytest.fail.Exception, match="again"):
        encoded(demo(), settings)


def _sizes(settings: TrainingConfig) -> list[Size]:
    return bucket_sizes(settings.size, settings.multiple, settings.most_ratio, 512)


def test_a_full_disk_says_what_is_missing_and_leaves_no_half_file(folder: Path, tmp_path: Path, monkeypatch) -> None:
    settings, write, count = config(folder, tmp_path / "out"), module.write_tensors, []

    def full(path, tensors, *args):
        count.append(path)
        if len(count) == 4:  # the second latent
            broken = {name: replace(lazy, load=_no_space) for name, lazy in tensors.items()}
            return write(path, broken, *args)
        return write(path, tensors, *args)

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError, match=r"1 of 3 samples are cached.*MB more") as caught:
        encoded(demo(), settings)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "out/cache") in str(caught.value)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == sorted(count[:3])
    assert all(open_tensors(path)[0] for path in files)
    monkeypatch.setattr(module, "write_tensors", write)
    assert len(encoded(demo(), settings).samples) == 3


def _no_space(*_: object) -> torch.Tensor:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_buckets() -> None:
    sizes = bucket_sizes(1024, 64, 2.0, 3072)
    assert Size(1024, 1024) in sizes
    assert all(one.height * one.width <= 1024**2 and one.height % 64 == one.width % 64 == 0 for one in sizes)
    assert max(max(one) / min(one) for one in sizes) <= 2
    assert bucket_of(Size(500, 500), sizes) == Size(1024, 1024)
    wide = bucket_of(Size(720, 1280), sizes)
    assert wide == Size(768, 1344)
    assert bucket_of(Size(100, 1000), sizes).width / bucket_of(Size(100, 1000), sizes).height == pytest.approx(
        2, rel=0.1
    )
    assert bucket_sizes(64, 16, 1.0, 512) == [Size(64, 64)]
    with pytest.raises(DataError, match="1024"):
        bucket_sizes(1024, 1024, 2.0, 512)


def test_pictures_cover_their_bucket() -> None:
    ramp = torch.linspace(0, 1, 90)[None, None, None, :].expand(1, 3, 40, 90)
    found = fitted(ramp, Size(32, 32))
    assert found.shape == (1, 3, 32, 32)
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01)  # cropped at the centre
    assert float(found[..., -1].mean() - found[..., 0].mean()) == pytest.approx(31 / 32 * 40 / 90, rel=0.05)
    assert torch.equal(fitted(ramp, Size(40, 90)), ramp)


def test_every_sample_comes_once_an_epoch_in_an_order_of_the_seed() -> None:
    shapes = [(1, 2), (1, 3), (1, 2), (1, 2), (1, 3), (1, 2)]
    found = order(shapes, 2, 5, 0)
    assert sorted(i for batch in found for i in batch) == list(range(6))
    assert all(len({shapes[i] for i in batch}) == 1 for batch in found)
    assert order(shapes, 2, 5, 0) == found
    assert len({str(order(shapes, 2, seed, epoch)) for seed in range(4) for epoch in range(4)}) > 8
    assert [members_at(shapes, 2, 5, place) for place in range(6)] == found + order(shapes, 2, 5, 1)
    filled = order(shapes, 4, 0, 0)
    assert [len(batch) for batch in filled] == [4, 4]
    assert {i for batch in filled for i in batch} == set(range(6))


def test_processes_share_the_batch_of_one() -> None:
    config = TrainingConfig(batch_size=4, dtype="float32", caption_dropout=0.5)
    whole = batch_at(samples(), config, 3.0, 2)
    halves = [batch_at(samples(), replace(config, batch_size=2), 3.0, 2, rank=rank, world=2) for rank in (0, 1)]
    for i, part in enumerate(whole[:5]):
        assert torch.equal(torch.cat([half[i] for half in halves]), part)


def test_draws() -> None:
    """Means of the densities, which `samplers.training` tests, and the latents' own noise."""
    means = {}
    for name in ("uniform", "logit_normal", "cosmap", "mode"):
        t = draw(TrainingConfig(timesteps=name), 1.0, (4000, 1), 0).t
        means[name] = float(t.mean())
    assert means == pytest.approx(dict.fromkeys(means, 0.5), abs=0.02)
    assert float(draw(TrainingConfig(), 3.0, (4000, 1), 0).t.mean()) > 0.65
    assert float(draw(TrainingConfig(caption_dropout=0.3), 1.0, (4000, 1), 0).dropped.float().mean()) == pytest.approx(
        0.3, abs=0.03
    )
    (one,) = samples(1).samples
    spread = InMemory([one._replace(std=torch.full_like(one.mean, 0.5))], samples(1).empty)
    drawn = batch_at(spread, TrainingConfig(latents="sample", dtype="float32"), 1.0, 0).x0[0] - one.mean
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.1)
    mode = batch_at(spread, TrainingConfig(latents="mode", dtype="float32"), 1.0, 0).x0[0]
    assert torch.equal(mode, one.mean)
    assert all(map(torch.equal, draw(TrainingConfig(), 1.0, (2, 3), 7), draw(TrainingConfig(), 1.0, (2, 3), 7)))


def test_samples_of_wrong_shapes_are_refused() -> None:
    """A latent of another shape than the noise would broadcast against it."""
    good, config = samples(1).read(0), TrainingConfig()
    batch = {"pooled": good.pooled[None], "context": good.context[None], "mean": good.mean[None]}
    for name, value in batch.items():
        with pytest.raises(ValueError, match=f"sample 0: {name}, "):
            batch_at(InMemory([good._replace(**{name: value})], samples(1).empty), config, 3.0, 0)
    hinted = good._replace(hint=good.mean, hint_std=torch.ones_like(good.mean))
    assert batch_at(InMemory([hinted], samples(1).empty), config, 3.0, 0).hint.shape == (1, *good.mean.shape)
    for wrong in ({"hint": good.mean[None]}, {"hint": good.mean[:, :1]}, {"hint_std": torch.ones(1)}, {"hint": None}):
        with pytest.raises(ValueError, match="sample 0: hint"):
            batch_at(InMemory([hinted._replace(**wrong)], samples(1).empty), config, 3.0, 0)
    with pytest.raises(ValueError, match=r"1 of 2 samples .* no hint"):  # one hint would be that of both
        batch_at(InMemory([good, hinted], samples(1).empty), replace(config, batch_size=2), 3.0, 0)
    with pytest.raises(ValueError, match="no samples"):
        batch_at(InMemory([], samples(1).empty), config, 3.0, 0)

    class Own(InMemory):
        shapes = ((16, 4, 6),)

    with pytest.raises(ValueError, match=r"mean.*\[16, 4, 6\]"):
        batch_at(Own([good], samples(1).empty), config, 3.0, 0)
