"""The training side against closed forms: distributions by Kolmogorov-Smirnov distance, losses exactly."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from samplers import training

DRAWS = 40_000
# P(sqrt(n) D > 1.95) is 0.1 % when the distribution is right; seeds are fixed, so a pass stays a pass.
KS_LIMIT = 1.95 / math.sqrt(DRAWS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ks_distance(draws: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    ordered = draws.double().sort().values
    n = len(ordered)
    expected = cdf(ordered)
    above = torch.arange(1, n + 1) / n - expected
    below = expected - torch.arange(n) / n
    return float(torch.maximum(above, below).max())


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mode_cdf(t: Tensor, scale: float) -> Tensor:
    """P(f(u) <= t) = 1 - f^-1(t), as f falls; the inverse by bisection."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        too_high = training.mode_map(middle, scale) > t
        low, high = torch.where(too_high, middle, low), torch.where(too_high, high, middle)
    return 1 - low


def test_uniform_follows_its_cdf() -> None:
    assert ks_distance(training.uniform(DRAWS, generator()), lambda t: t) < KS_LIMIT


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (0.5, 1.5)])
def test_logit_normal_follows_its_cdf(mean: float, std: float) -> None:
    draws = training.logit_normal(DRAWS, mean, std, generator())
    assert ks_distance(draws, lambda t: normal_cdf((torch.logit(t) - mean) / std)) < KS_LIMIT
    # The distance tells neighbours apart: another mean is refused.
    assert ks_distance(draws, lambda t: normal_cdf((torch.logit(t) - mean - 0.1) / std)) > KS_LIMIT


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_follows_its_cdf(scale: float) -> None:
    draws = training.mode(DRAWS, scale, generator(1))
    assert ks_distance(draws, lambda t: mode_cdf(t, scale)) < KS_LIMIT
    assert ks_distance(draws, lambda t: mode_cdf(t, scale - 0.2 if scale > 0 else scale + 0.2)) > KS_LIMIT


def test_cosmap_follows_the_integral_of_its_density() -> None:
    def cdf(t: Tensor) -> Tensor:
        return 0.5 + torch.atan(2 * t - 1) * 2 / math.pi

    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(training.cosmap_weight(grid), grid)
    assert torch.allclose(integral, cdf(grid[1:]), atol=1e-8)
    assert ks_distance(training.cosmap(DRAWS, generator()), cdf) < KS_LIMIT


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.8)])
def test_logit_normal_weight_is_the_density(mean: float, std: float) -> None:
    grid = torch.linspace(1e-6, 1 - 1e-6, 20_001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(training.logit_normal_weight(grid, mean, std), grid)
    assert torch.allclose(integral, normal_cdf((torch.logit(grid[1:]) - mean) / std), atol=1e-6)


def test_mode_map_is_the_published_formula_and_monotone() -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for scale in (*training.MODE_SCALES, 0.5):
        t = training.mode_map(u, scale)
        assert t[0] == 1
        assert abs(t[-1]) < 1e-15
        assert (t.diff() <= 1e-12).all()
    one = math.cos(math.pi * 0.3 / 2) ** 2
    assert float(training.mode_map(torch.tensor(0.3, dtype=torch.float64), 1.29)) == pytest.approx(
        1 - 0.3 - 1.29 * (one - 1 + 0.3), abs=1e-15
    )


def test_shift_composes_inverts_and_keeps_the_ends() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    twice = training.shifted(training.shifted(t, 3.0), 2.0)
    assert torch.allclose(twice, training.shifted(t, 6.0), atol=1e-15)
    assert torch.allclose(training.shifted(training.shifted(t, 3.0), 1 / 3.0), t, atol=1e-15)
    assert training.shifted(t, 3.0)[[0, 50, 100]].tolist() == [0.0, 0.75, 1.0]


def test_noising_ends_at_data_and_noise_and_moves_with_the_velocity() -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=generator())
    assert torch.equal(training.noised(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(training.noised(x0, noise, torch.ones(3)), noise)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    step = training.noised(x0, noise, t + 0.01) - training.noised(x0, noise, t)
    assert torch.allclose(step / 0.01, training.velocity(x0, noise), atol=1e-12)
    back = training.noised(x0, noise, t) - t.reshape(3, 1, 1, 1) * training.velocity(x0, noise)
    assert torch.allclose(back, x0, atol=1e-14)


def test_noising_keeps_the_data_type() -> None:
    x0 = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert training.noised(x0, x0 + 1, torch.tensor([0.25, 0.5])).dtype == torch.bfloat16


def test_loss_is_zero_for_the_exact_velocity_only() -> None:
    x0, noise = torch.randn(2, 4, 16, 3, 3, generator=generator())
    exact = noise - x0
    for weighting in training.WEIGHTINGS.values():
        weight = weighting(torch.tensor([0.2, 0.4, 0.6, 0.8]))
        assert training.velocity_loss(exact, x0, noise, weight) == 0
        assert training.velocity_loss(x0 - noise, x0, noise, weight) > 1


def test_loss_of_a_constant_error_is_the_mean_weight() -> None:
    x0, noise = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator())
    weight = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    off = noise - x0 + 0.5
    assert float(training.velocity_loss(off, x0, noise)) == pytest.approx(0.25, rel=1e-12)
    assert float(training.velocity_loss(off, x0, noise, weight)) == pytest.approx(0.25 * 3, rel=1e-12)


def test_loss_gradient_is_the_closed_form() -> None:
    x0, noise, predicted = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator())
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    predicted.requires_grad_()
    training.velocity_loss(predicted, x0, noise, weight).backward()
    expected = 2 * weight[:, None] * (predicted.detach() - (noise - x0)) / predicted.numel()
    assert predicted.grad is not None
    assert torch.allclose(predicted.grad, expected, atol=1e-15)
    assert torch.autograd.gradcheck(lambda p: training.velocity_loss(p, x0, noise, weight), predicted)


def test_loss_of_low_precision_is_computed_wide() -> None:
    x0, noise = torch.randn(2, 2, 64, generator=generator()).bfloat16()
    loss = training.velocity_loss((noise.float() - x0.float()).bfloat16(), x0, noise)
    assert loss.dtype == torch.float32
    assert 0 < loss < 1e-4


def test_weighting_uniform_times_equals_drawing_from_the_density() -> None:
    def error(t: Tensor) -> Tensor:
        return 1 + t + torch.sin(5 * t)

    t = training.uniform(DRAWS, generator(2)).double().clamp(1e-6, 1 - 1e-6)
    drawn = {
        "cosmap": training.cosmap(DRAWS, generator(3)),
        "logit_normal": training.logit_normal(DRAWS, generator=generator(4)),
    }
    for name, times in drawn.items():
        weighted = (training.WEIGHTINGS[name](t) * error(t)).mean()
        assert abs(weighted - error(times.double()).mean()) < 5 * 1.5 / math.sqrt(DRAWS), name


def test_weights_are_their_formulas() -> None:
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert training.plain_weight(t).tolist() == [1, 1]
    assert training.sigma_sqrt_weight(t).tolist() == [16, 4]
    assert training.cosmap_weight(t).tolist() == pytest.approx([2 / (math.pi * 0.625), 4 / math.pi], rel=1e-14)
    peak = 4 / math.sqrt(2 * math.pi)
    assert float(training.logit_normal_weight(t)[1]) == pytest.approx(peak, rel=1e-14)


def test_draws_repeat_with_the_seed() -> None:
    for draw in (training.uniform, training.logit_normal, training.mode, training.cosmap):
        first = draw(100, generator=generator(5))
        assert first.dtype == torch.float32
        assert torch.equal(first, draw(100, generator=generator(5)))
        assert not torch.equal(first, draw(100, generator=generator(6)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: training.uniform(-1), "number of times .* got -1"),
        (lambda: training.logit_normal(4, std=0.0), "std .* got 0.0"),
        (lambda: training.logit_normal_weight(torch.ones(1) / 2, std=-1.0), "std .* above 0"),
        (lambda: training.mode(4, scale=2.0), "mode scale .* got 2.0"),
        (lambda: training.shifted(torch.ones(2), 0.0), "shift .* got 0.0"),
        (
            lambda: training.noised(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2)),
            r"\(2, 3\) but noise has \(2, 4\)",
        ),
        (lambda: training.noised(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)), r"shape \(2,\), got \(3,\)"),
        (lambda: training.velocity_loss(torch.ones(1, 3), torch.ones(2, 3), torch.ones(2, 3)), "predicted has shape"),
        (
            lambda: training.velocity_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1)),
            "one value per sample",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
