"""A folder of pictures of the embedded model's world."""

import pytest
from PIL import Image

from mmdit.demo.captions import training_captions
from mmdit.demo.scenes import render, sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures with captions, of two sizes."""
    root = tmp_path_factory.mktemp("pictures")
    scenes = sample(3, 0)
    for i, (picture, texts) in enumerate(zip(render(scenes), training_captions(scenes, 1, 0), strict=True)):
        image = Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy())
        (image if i else image.crop((0, 20, 128, 108))).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(texts[0])
    return root
