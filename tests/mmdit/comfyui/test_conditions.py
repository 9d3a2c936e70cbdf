"""What several prompts predict together: windows, strengths, masks, areas, and the negative prompt of an area."""

import pytest
import torch

from encoders import Conditioning
from mmdit.comfyui import conditions
from mmdit.comfyui.conditions import predicted, resolved
from mmdit.comfyui.values import Area, Model, Prompt
from recorded_workflows import bare_model

SHAPE = (1, 16, 24, 32)


@pytest.fixture
def model(monkeypatch) -> Model:
    """A stand-in: what it predicts is everywhere the first number of the text."""

    def predict(transformer, profile, x, sigma, branches, announce):
        seen.append(tuple(x.shape[2:]))
        return [torch.full_like(x, float(one.conditioning.context[0, 0, 0])) for one in branches]

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(conditions, "predict_branches", predict)
    made = bare_model()
    made.transformer.seen = seen
    return made


def prompt(value: float, **more: object) -> Prompt:
    return Prompt(Conditioning(torch.full((1, 3, 4), float(value)), torch.zeros(1, 2)), **more)


def predictions(model: Model, *several: tuple[Prompt, ...], sigma: float = 0.9) -> list[torch.Tensor]:
    x = torch.zeros(SHAPE)
    return [one[0, 0] for one in predicted(model, x, sigma, resolved(several, model, SHAPE))]


def test_entries_are_averaged_by_their_strength(model):
    (found,) = predictions(model, (prompt(1.0, strength=3.0), prompt(5.0)))
    assert torch.allclose(found, torch.tensor(2.0))


def test_an_entry_counts_inside_of_its_window_and_0_is_predicted_outside_of_all(model):
    early, late = prompt(1.0, end=0.5), prompt(2.0, start=0.6)
    half = 0.75  # the noise level after half of the way, with shift 3
    for sigma, wanted in ((0.9, 1.0), (half, 1.0), (0.7, 0.0), (0.2, 2.0)):
        (found,) = predictions(model, (early, late), sigma=sigma)
        assert torch.allclose(found, torch.tensor(wanted)), sigma


def test_a_mask_weighs_each_place(model):
    mask = torch.zeros(1, 24, 32)
    mask[:, :, 16:] = 1
    (found,) = predictions(model, (prompt(1.0), prompt(5.0, mask=mask, mask_strength=3.0)))
    assert torch.allclose(found[:, :16], torch.tensor(1.0)) and torch.allclose(found[:, 16:], torch.tensor(4.0))


def test_the_model_sees_an_area_alone_and_its_inner_edges_fade(model):
    area = Area(8, 16, 0, 12)
    (found,) = predictions(model, (prompt(1.0), prompt(2.0, area=area, strength=1.0)))
    assert model.transformer.seen == [(24, 32), (8, 16)]
    outside = torch.ones(24, 32, dtype=bool)
    outside[:8, 12:28] = False
    assert (found[outside] == 1).all()
    # 8 rows have a ramp of 2 at the bottom, 16 columns one of 4 at both sides: weight w gives (1 + 2 w) / (1 + w)
    share = (found - 1) / (2 - found)
    assert torch.allclose(share[0, 12:28], torch.tensor([0.25, 0.5, 0.75, *[1] * 10, 0.75, 0.5, 0.25]), atol=1e-5)
    assert torch.allclose(share[:8, 20], torch.tensor([1.0] * 6 + [1.0, 0.5]), atol=1e-5)


def test_the_negative_prompt_of_an_area_is_its_own_text_cut_out_alike(model):
    area = Area(0.5, 0.5, 0.5, 0.5, in_shares=True)
    positive, negative = resolved([(prompt(1.0), prompt(2.0, area=area)), (prompt(7.0),)], model, SHAPE)
    assert [one.area for one in negative] == [None, (12, 16, 12, 16)]
    assert [float(one.conditioning.context[0, 0, 0]) for one in negative] == [7.0, 7.0]
    assert [one.area for one in positive] == [None, (12, 16, 12, 16)]


def test_the_bounds_of_a_mask_are_at_least_8_cells(model):
    mask = torch.zeros(1, 24, 32)
    mask[:, 3:5, 10:30] = 1
    (entries,) = resolved([(prompt(1.0, mask=mask, mask_bounds=True),)], model, SHAPE)
    assert entries[0].area == (8, 20, 3, 10)


def test_text_of_another_model_is_refused(model):
    other = Prompt(Conditioning(torch.zeros(1, 3, 5), torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"5 channels.*4"):
        resolved([(other,)], model, SHAPE)


def test_an_area_outside_of_the_picture_is_refused(model):
    with pytest.raises(ValueError, match="x 256"):
        resolved([(prompt(1.0, area=Area(8, 8, 0, 32)),)], model, SHAPE)
