"""The trained VAE of the embedded model, and the random checkpoint that `make demo` draws with."""

import torch

from mmdit import Pipeline, load_vae
from mmdit.demo.captions import training_captions
from mmdit.demo.scenes import render, sample
from mmdit.demo.score import check, parse_batch, statements, symbolic
from mmdit.demo.seeded import VAE_WEIGHTS, write_seeded


def test_the_vae_keeps_what_a_picture_says():
    """Scenes that no training saw: at least 32 dB, and the scorer says of the decoded what is true of the scene."""
    scenes = sample(24, 987_654_321)
    pictures, vae = render(scenes), load_vae(VAE_WEIGHTS, dtype=torch.float32)
    latent = vae.encode(2 * pictures - 1).mode()
    decoded = (vae.decode(latent) / 2 + 0.5).clamp(0, 1)
    assert float(-10 * (decoded - pictures).square().mean().log10()) >= 32
    assert 0.9 < float(latent.std()) < 1.1
    verdicts = []
    captions = [texts[0] for texts in training_captions(scenes, 1, 1)]
    for index, (parsed, scene) in enumerate(zip(parse_batch(decoded), scenes.words(), strict=True)):
        claims = [*statements(captions[index]), *statements(captions[index - 1])]
        verdicts += [check(claim, parsed) == check(claim, symbolic(scene)) for claim in claims]
    assert sum(verdicts) / len(verdicts) >= 0.99


def test_the_seeded_checkpoint_is_the_same_every_time_and_draws(tmp_path):
    one, two = write_seeded(tmp_path / "one"), write_seeded(tmp_path / "two")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) >= 15
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    pipe = Pipeline.from_pretrained(one)
    few = {"num_inference_steps": 2, "output_type": "pt"}
    picture = pipe("a red circle", seed=1, **few).images
    assert picture.shape == (1, 3, 128, 128)
    assert not torch.equal(picture, pipe("a blue square", seed=1, **few).images)
