"""Canny edges against what ComfyUI's node and OpenCV gave."""

from importlib.util import find_spec

import pytest
import torch

import mmdit
import recorded_models as recorded
from golden import DATA
from skips import SKIPS

PHOTO = DATA / "images" / "pub_photo.png"


def wanted(name):
    return (recorded.records()[name] > 0).float().squeeze()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("node.canny.photo.0.4.0.8.edges", None, None),
        ("node.canny.photo.0.1.0.2.edges", 0.1, 0.2),
        ("controlnet.canny_node.image.14", 0.1, 0.3),
    ],
)
def test_kornia_0_9(name, low, high):
    """Every pixel, as ComfyUI's node gave them with kornia 0.9.0."""
    found = mmdit.canny(PHOTO, low, high)
    assert found.shape == (1, 96, 128, 3)
    assert torch.equal(found[0, ..., 0], wanted(name))
    assert torch.equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.8), (0.1, 0.2)])
def test_kornia_0_7(low, high):
    """Two pixels of about 190 or 370 edges are equal to a neighbour but for the last bit."""
    name = f"node.canny_k074.photo.{low}.{high}.edges"
    found = mmdit.canny(PHOTO, low, high, rule="kornia-0.7")[0, ..., 0]
    assert int((found != wanted(name)).sum()) <= 2
    assert int((found != mmdit.canny(PHOTO, low, high)[0, ..., 0]).sum()) >= 4, "the versions differ"


def test_opencv():
    if find_spec("cv2") is None:
        with pytest.raises(ImportError, match="opencv"):
            mmdit.canny(PHOTO, rule="opencv")
        pytest.skip(SKIPS["opencv"])
    assert torch.equal(mmdit.canny(PHOTO, rule="opencv")[0, ..., 0], wanted("node.canny_opencv.photo.edges"))


def test_a_step_and_a_corner():
    """A vertical step has one line of edge pixels, on its left; a flat picture has none."""
    picture = torch.zeros(1, 16, 16, 3)
    picture[:, :, 8:] = 1
    edges = mmdit.canny(picture)[0, ..., 0]
    assert edges.sum(0).nonzero().flatten().tolist() == [7]
    assert mmdit.canny(torch.full((1, 16, 16, 3), 0.3)).sum() == 0


@pytest.mark.parametrize(
    ("low", "high", "rule"),
    [(0.8, 0.4, "kornia-0.9"), (0.0, 0.4, "kornia-0.9"), (0.1, float("nan"), "kornia-0.9"), (0.1, 0.2, "kornia")],
)
def test_arguments(low, high, rule):
    with pytest.raises(ValueError, match=r"low|high|rule"):
        mmdit.canny(PHOTO, low, high, rule=rule)
