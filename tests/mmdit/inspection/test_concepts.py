"""Concept tokens read the picture, and nothing reads them."""

from contextlib import ExitStack

import pytest
import torch

import mmdit
from inspected import CONFIG, PATCHES, TEXT, inputs, left_behind, model, untouched
from mmdit.inspection.concepts import ConceptTokens

VECTORS = torch.randn(3, CONFIG.context_dim, generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture(scope="module")
def demo():
    return mmdit.Pipeline.demo()


def test_nothing_reads_them(monkeypatch):
    small = model()
    plain = small(*inputs())
    with mmdit.concept_tokens(small, VECTORS) as concepts:
        torch.testing.assert_close(small(*inputs()), plain, rtol=1e-12, atol=1e-12)
    assert left_behind(small) == []
    assert torch.equal(small(*inputs()), plain)
    found = concepts.maps(branch=None)
    assert found.dims == ("block", "sample", "concept", "row", "column")
    assert found.values.shape == (3, 2, 3, 2, 3)
    torch.testing.assert_close(found.values.sum(2), torch.ones(3, 2, 2, 3).double())
    # Were they read, the picture would not be the same.
    monkeypatch.setattr(ConceptTokens, "__call__", lambda self, q, k, v, below: below(q, k, v))
    with mmdit.concept_tokens(small, VECTORS):
        assert (small(*inputs()) - plain).abs().max() > 1e-3


def test_they_read_the_image_and_themselves():
    small, last = model(), TEXT + len(VECTORS)
    outside, given = [], []
    attend = small.joint_blocks[1].attend
    handles = [
        attend.register_forward_hook(lambda _, __, z: outside.append(z)),
        attend.register_forward_pre_hook(lambda _, qkv: given.append(qkv)),
    ]
    with mmdit.concept_tokens(small, VECTORS) as concepts:
        small(*inputs())
    for handle in handles:
        handle.remove()
    (q, k, v), z = given[0], outside[0]
    assert q.shape[2] == last + PATCHES
    pattern = (q[:, :, TEXT:last] @ k[:, :, TEXT:].transpose(-1, -2) / 8).softmax(-1)
    torch.testing.assert_close(z[:, :, TEXT:last], pattern @ v[:, :, TEXT:])
    flat = z.transpose(1, 2).flatten(2)
    shares = (flat[:, TEXT:last] @ flat[:, last:].transpose(1, 2)).softmax(1)
    torch.testing.assert_close(concepts.maps(branch=None).sel(block=1).values.flatten(2), shares)


@pytest.mark.parametrize("first", ["capture", "concepts"])
def test_points_of_attention_see_text_and_image_alone(first):
    small = model()
    with mmdit.capture(small, "*1.attend.*", budget=None) as plain:
        small(*inputs())
    both = [mmdit.capture(small, "*1.attend.*"), mmdit.concept_tokens(small, VECTORS)]
    with ExitStack() as stack:
        entered = [stack.enter_context(one) for one in (both if first == "capture" else both[::-1])]
        small(*inputs())
    seen = entered[0 if first == "capture" else 1]
    assert set(seen) == {f"joint_blocks.1.attend.{part}" for part in ("q", "k", "v", "pattern", "z")}
    for name in plain:
        torch.testing.assert_close(seen[name], plain[name])


def test_words_of_a_pipeline(demo):
    settings = {"seed": 7, "num_inference_steps": 8, "output_type": "latent", "max_sequence_length": 16}
    prompt, words = "a large red circle on the left of a large blue star", ["red", "blue", "background"]
    plain = demo(prompt, **settings).images
    with untouched(demo), mmdit.concept_tokens(demo, words, blocks=[0, 2], steps=slice(4, None)) as concepts:
        torch.testing.assert_close(demo(prompt, **settings).images, plain, rtol=1e-4, atol=1e-4)
    found = concepts.maps()
    assert found.labels("concept") == tuple(words)
    assert found.labels("block") == (0, 2)
    assert found.values.shape == (2, 1, 3, 8, 8)
    with pytest.raises(ValueError, match="no maps of branch 'skip'; there are some of 'uncond', 'cond'"):
        concepts.maps("skip")


def test_wrong_concepts_are_explained(demo):
    small = model()
    for one, concepts, said in (
        (demo, ["circle"], "maps compare concepts: give at least two"),
        (small, ["circle", "star"], "words are read by a pipeline"),
        (demo, ["circle", ""], "'' is no word"),
    ):
        with pytest.raises(ValueError, match=said), mmdit.concept_tokens(one, concepts):
            pass
    with pytest.raises(ZeroDivisionError), mmdit.concept_tokens(small, VECTORS):
        raise ZeroDivisionError
    assert left_behind(small, *demo.models.values()) == []
