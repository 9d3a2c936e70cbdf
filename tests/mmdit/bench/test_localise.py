"""Words of the embedded model point at their objects, measured where the objects are."""

import json
from dataclasses import replace

import pytest
import torch

from mmdit import Pipeline
from mmdit.bench.localise import Shares, localise, main, markdown, means, places, rows_of
from mmdit.demo.captions import prompts
from mmdit.demo.evaluate import MAIN, SEED
from mmdit.demo.scenes import Scene, SceneObject, from_words, render
from mmdit.demo.vision import masks, parse


@pytest.fixture(scope="module")
def picture():
    """A red circle at the upper left, a blue circle at the lower right, a red star at the upper right."""
    objects = (
        SceneObject("circle", "red", "large", 32.0, 32.0, 40.0),
        SceneObject("circle", "blue", "large", 96.0, 96.0, 40.0),
        SceneObject("star", "red", "large", 96.0, 32.0, 40.0),
    )
    return render(from_words([Scene("white", objects)]))[0]


def test_masks_are_the_objects(picture):
    """Pixels of each object, in the order in which `parse` names them; a circle of 40 pixels has area 1257."""
    found, pixels = parse(picture).objects, masks(picture)
    assert pixels.shape == (3, 128, 128)
    assert pixels.sum(0).max() == 1
    for one, mask in zip(found, pixels, strict=True):
        rows, columns = mask.nonzero().float().mean(0).tolist()
        assert (one.x, one.y) == pytest.approx((columns + 0.5, rows + 0.5), abs=3)
        if one.shape == "circle":
            assert int(mask.sum()) == pytest.approx(1257, rel=0.06)


def test_places_of_words(picture):
    found = places(picture, ["red", "circles", "star", "green"], (2, 2))
    assert set(found) == {"red", "circles", "star"}  # nothing is green
    where = {word: (place.own > 0).tolist() for word, place in found.items()}
    assert where == {
        "red": [[True, True], [False, False]],
        "circles": [[True, False], [False, True]],
        "star": [[False, True], [False, False]],
    }
    covered = float(masks(picture).float().sum(0).mean())
    for place in found.values():
        assert float((place.own + place.others).mean()) == pytest.approx(covered, rel=1e-6)


def test_meanings():
    assert means("Red") == ("colour", "red")
    assert means("circles") == ("shape", "circle")
    assert means("white") is means("above") is None


def test_ratios_of_known_maps():
    """All of the map inside gives 1 / area, a flat map 1; words of a prompt are drawn together."""
    parts = [torch.tensor([1.0, 0.1]).expand(2, 3, 2), torch.tensor([1.0, 0.3]).expand(2, 3, 2)]
    found = [
        Shares(0, "colour", 0.1, parts[0], 0.2, 0.2 * torch.ones(2, 3, 2)),
        Shares(1, "colour", 0.3, parts[1], 0.0, torch.full((2, 3, 2), float("nan"))),
        Shares(1, "shape", 0.3, parts[1], 0.0, torch.full((2, 3, 2), float("nan"))),
    ]
    rows = {(row.block, row.kind): row for row in rows_of(found) if (row.direction, row.encoder) == ("t2i", "clip")}
    value, low, high = rows["0", "colour"].own
    assert value == pytest.approx(2 / 0.4)
    assert (low, high) == pytest.approx((1 / 0.3, 1 / 0.1))
    assert rows["all", "colour"].own == pytest.approx((1, 1, 1))
    assert rows["0", "colour"].others[0] == pytest.approx(1)
    assert rows["0", "colour"].words == 2
    table = " ".join(markdown(rows_of(found)).split())
    assert "| t2i | clip | 0 | 5.00 (3.33 to 10.00) | 1.00" in table
    assert "2 colour words, whose objects cover 20.0 %; 1 shape words, whose objects cover 30.0 %." in table


def test_words_point_at_their_objects(monkeypatch):
    """Image patches of the last block read the word of what is drawn there: far more inside, less in other objects."""
    pipe = Pipeline.demo()
    monkeypatch.setattr("mmdit.bench.localise.MAIN", replace(MAIN, t5="77"))
    with torch.no_grad():
        rows = rows_of(list(localise(pipe, prompts(8, SEED, held_out=True), steps=6, batch=8)))
    found = {(row.direction, row.encoder, row.block, row.kind): row for row in rows}
    for kind, least in (("colour", 1.1), ("shape", 3.0)):
        row = found["i2t", "all", "3", kind]
        assert row.words > 16
        assert row.own[1] > least, row
        assert row.others[2] < 1, row
    assert found["t2i", "clip", "2", "shape"].own[1] > 2


def test_command(tmp_path, capsys):
    assert main(["--prompts", "1", "--steps", "2", "--output", str(tmp_path / "rows.json")]) == 0
    assert "| i2t | all | 0 |" in " ".join(capsys.readouterr().out.split())
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2 * 3 * 5 * 2
