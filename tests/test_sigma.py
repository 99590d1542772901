"""Sigma training: the solver against closed forms and tabulated trajectories, runs, bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from kdfast.ops import Key
from kdfast.training.sigma import SigmaSettings, descend, entropy, solve_sigma
from kdfast.training.sigma_memory import bytes_per_sample, choose_chunk, working_bytes

SMALL = SigmaSettings(grid=4, samples=8)


def expected(a: torch.Tensor, initial: float = 0.01):
    """The feature term of a linear network, sensitivities a [G, G], noise by its expectation."""
    a = a.double()

    def term(sigma: torch.Tensor, which: torch.Tensor, step: int):
        ratio = a * sigma / (initial**2 * a.sum())
        return (ratio * sigma).sum((1, 2, 3)), 2 * ratio

    return term


def solved(a: torch.Tensor, settings: SigmaSettings):
    alive = torch.ones(1, dtype=torch.bool)
    return descend(expected(a), alive, settings, torch.ones(1, dtype=torch.float64))


def linear(weights: torch.Tensor):
    """phi(x) = w * x + c elementwise, c so large that ReLU does nothing; a_i = sum of w^2."""
    return lambda x: torch.relu(weights * x + 100.0)


def mosaic(seed: int = 0, grid: int = 4, side: int = 8) -> torch.Tensor:
    """Weights [1, side, side], one value a cell, between 0.7 and 1.3."""
    cells = torch.rand(grid, grid, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.7
    return cells.repeat_interleave(side // grid, 0).repeat_interleave(side // grid, 1)[None]


def images_of(count: int, side: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def sensitivities(weights: torch.Tensor, grid: int = 4) -> torch.Tensor:
    side = weights.shape[-1] // grid
    squares = 3 * weights[0].double().square()
    return squares.unfold(0, side, side).unfold(1, side, side).sum((2, 3))


# Check 1: the closed-form optimum.


@pytest.mark.parametrize(
    "weight, optimum, nats", [(7.0, 0.0187083, -2.559850), (6.0, 0.0173205, -2.636926)]
)
def test_uniform_sensitivity_ends_at_the_closed_form(weight, optimum, nats):
    settings = SigmaSettings(weight=weight, lr=2e-3, steps=100, more_steps=0, full=True, target=9.0)
    found = solved(torch.ones(16, 16), settings)
    assert found.sigma.squeeze() == pytest.approx(np.full((16, 16), optimum), rel=1e-5)
    assert float(found.mean_entropy[0, -1]) == pytest.approx(nats, abs=1e-5)
    assert float(found.feature_loss[0, -1]) == pytest.approx(weight / 2, rel=1e-5)


def test_optimum_of_unequal_cells_and_its_clipping():
    a = mosaic(3)[0, ::2, ::2].double()
    a[0, 0] = 20
    optimum = 0.01 * (7 * a.sum() / (2 * 16 * a)).sqrt()
    low, high = 0.007, float(optimum.median())
    assert optimum.min() < low and optimum.max() > high
    settings = replace(SMALL, lr=4e-5, steps=300, more_steps=0, full=True, target=9.0)
    found = solved(a, replace(settings, low=low, high=high))
    assert torch.allclose(found.sigma[0, 0], optimum.clamp(low, high), rtol=1e-4)


def test_long_training_with_noise_reaches_the_closed_form():
    weights = mosaic()
    a = sensitivities(weights)
    settings = replace(SMALL, samples=512, lr=3e-5, steps=150, more_steps=0, full=True, target=9.0)
    optimum = 0.01 * (7 * a.sum() / (2 * 16 * a)).sqrt()
    found = solve_sigma(linear(weights), images_of(1), torch.tensor([7]), settings, Key(0))
    ratio = found.sigma[0, 0] / optimum
    assert float(ratio.mean()) == pytest.approx(1, abs=5e-3)
    assert float(ratio.std()) < 0.01


# Check 2: the shape does not depend on lambda.


@pytest.mark.parametrize("weight", [5.0, 7.0])
def test_entropy_differences_are_those_of_the_sensitivities(weight):
    a = sensitivities(mosaic(5))
    settings = replace(SMALL, weight=weight, lr=1e-4, steps=150, more_steps=0, target=9.0)
    h = solved(a, settings).entropy[0]
    assert torch.allclose(h - h.mean(), -0.5 * (a.log() - a.log().mean()), atol=1e-4)
    background = torch.zeros(4, 4, dtype=torch.bool)
    background[:, :2] = True
    level = math.exp(a[background].log().mean())
    assert torch.equal(h[background].mean() - h > 0.2, a > 1.491825 * level)


# Check 3: tabulated trajectories.

TABLE = [
    (7.0, [-3.186232, -3.166889, -3.148564, -3.131169], -2.724816, 60, 40, -2.798281),
    (6.0, [-3.186232, -3.170727, -3.155928, -3.141782], -2.789120, 60, 55, -2.800841),
    (5.0, [-3.186232], -2.862892, 80, 69, -2.800894),
    (4.0, [-3.186232], -2.949403, 80, 79, -2.846763),
]


@pytest.mark.parametrize("weight, first, later, steps, selected, there", TABLE)
def test_tabulated_trajectories(weight, first, later, steps, selected, there):
    full = solved(torch.ones(16, 16), SigmaSettings(weight=weight, full=True))
    means = full.mean_entropy[0]
    assert means[: len(first)].tolist() == pytest.approx(first, abs=1e-6)
    assert float(means[59]) == pytest.approx(later, abs=1e-6)
    assert (int(full.steps_run), int(full.selected)) == (steps, selected)
    assert float(means[selected]) == pytest.approx(there, abs=1e-6)
    assert float(full.entropy.mean()) == pytest.approx(there, abs=1e-6)
    assert (means[steps:] == 0).all()
    # Stopping at the crossing selects the same.
    short = solved(torch.ones(16, 16), SigmaSettings(weight=weight))
    crossed = there != -2.846763
    assert int(short.steps_run) <= selected + 2 if crossed else int(short.steps_run) == steps
    assert int(short.selected) == selected
    assert torch.equal(short.sigma, full.sigma)


def test_a_falling_mean_entropy_is_followed_to_the_end():
    """It begins above the target: the closest step is a later one."""
    settings = SigmaSettings(initial=0.02, weight=2.0)
    found = solved(torch.ones(16, 16), settings)
    assert (found.mean_entropy[0, 1:60] < found.mean_entropy[0, :59]).all()
    assert int(found.steps_run) == 60 and int(found.selected) > 0
    gaps = (found.mean_entropy[0, :60] + 2.8).abs()
    assert int(found.selected) == int(gaps.argmin())


def test_interpolation_meets_the_target():
    found = solved(mosaic(2)[0, ::2, ::2], replace(SMALL, lr=1e-5, steps=100, interpolate=True))
    assert float(found.entropy.mean()) == pytest.approx(-2.8, abs=1e-9)
    plain = solved(mosaic(2)[0, ::2, ::2], replace(SMALL, lr=1e-5, steps=100))
    assert int(plain.selected) == int(found.selected)
    assert abs(float(plain.entropy.mean()) + 2.8) > 1e-6


# Check 4: normalisation.


def test_delta2_makes_the_loss_one_at_the_initial_sigma():
    weights, settings = mosaic(1), replace(SMALL, steps=1, more_steps=0, samples=16)
    found = [
        float(solve_sigma(linear(weights), images_of(1), torch.tensor([3]), settings, Key(s))
              .feature_loss[0, 0])
        for s in range(20)
    ]  # fmt: skip
    assert abs(np.mean(found) - 1) < 3 * np.std(found, ddof=1) / math.sqrt(20)
    assert np.std(found) > 0


@pytest.mark.parametrize("factor, exact", [(4.0, True), (0.125, True), (3.0, False)])
def test_scaling_the_tap_changes_nothing(factor, exact):
    weights, settings = mosaic(1), replace(SMALL, steps=4, more_steps=0)
    tap = torch.nn.Conv2d(3, 5, 3)
    plain, scaled = (
        solve_sigma(
            lambda x, f=f: torch.relu(f * tap(weights * x)), images_of(2), torch.arange(2),
            settings, Key(0),
        )
        for f in (1.0, factor)
    )  # fmt: skip
    for name in ("sigma", "feature_loss", "mean_entropy"):
        a, b = getattr(plain, name), getattr(scaled, name)
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4)


# Check 5: constants.


def test_entropy_constants():
    values = [0.01, math.exp(-2.8 - entropy(torch.ones(1).double()).item()), 0.001, 1.0]
    values += [0.01 * math.sqrt(weight / 2) for weight in (7, 6)]
    assert values[1] == pytest.approx(0.0147143, abs=5e-8)
    known = [-3.186232, -2.8, -5.488817, 1.418939, -2.559850, -2.636926]
    assert entropy(torch.tensor(values).double()).tolist() == pytest.approx(known, abs=1e-6)
    sigma = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    entropy(sigma).mean().backward()
    assert torch.allclose(sigma.grad, 1 / (16 * sigma.detach()))


# Check 7: batched = single.


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3, stride=2)]
    return torch.nn.Sequential(*layers).requires_grad_(False)


def test_batched_equals_single_with_escalation_and_early_stop():
    model = network()
    phi = lambda x: torch.relu(model(x))  # noqa: E731
    images, ids = images_of(5, 16), torch.tensor([40, 3, 17, 8, 5])
    images[1] *= 0.1
    images[3] += 2
    settings = SigmaSettings(grid=8, samples=8, lr=4e-5, steps=38, more_steps=12, weight=5.0)
    curves = solve_sigma(phi, images, ids, replace(settings, full=True), Key(0, "x"))
    highest = curves.mean_entropy[:, :38].max(1).values.sort().values
    # Some pass it in time, some do not.
    settings = replace(settings, target=float(highest[1:3].mean()))
    together = solve_sigma(phi, images, ids, settings, Key(0, "x"))
    runs = together.steps_run
    assert (runs > 38).any() and (runs < 38).any()
    for i in range(5):
        alone = solve_sigma(phi, images[i : i + 1], ids[i : i + 1], settings, Key(0, "x"))
        assert int(alone.selected) == int(together.selected[i])
        assert int(alone.steps_run) == int(runs[i])
        assert torch.allclose(alone.sigma[0], together.sigma[i], rtol=1e-5, atol=0)
    pieces = solve_sigma(phi, images, ids, settings, Key(0, "x"), chunk=3)
    assert torch.equal(pieces.selected, together.selected)
    assert torch.allclose(pieces.sigma, together.sigma, rtol=1e-6, atol=0)


def test_full_steps_select_what_the_early_stop_does_on_noise():
    model = network()
    phi = lambda x: torch.relu(model(x))  # noqa: E731
    settings = SigmaSettings(grid=8, samples=8, lr=4e-5, steps=60, more_steps=5, target=-2.9)
    short, full = (
        solve_sigma(phi, images_of(2, 16), torch.arange(2), replace(settings, full=f), Key(1))
        for f in (False, True)
    )
    assert (full.mean_entropy[:, :60].diff(dim=1) > 0).all()
    assert (short.steps_run < 60).all() and (full.steps_run == 60).all()
    assert torch.equal(short.selected, full.selected)
    assert torch.equal(short.sigma, full.sigma)


def test_a_feature_that_does_not_react_has_no_answer():
    def phi(x: torch.Tensor) -> torch.Tensor:
        return (
            torch.relu(x * (x[:, :, :1, :1] > 0) - 0.0)
            * (x.flatten(1).mean(1) > 0)[:, None, None, None]
        )

    images = torch.stack([torch.full((3, 8, 8), v) for v in (1.0, -1.0)])
    found = solve_sigma(phi, images, torch.arange(2), replace(SMALL, steps=2), Key(0))
    assert found.selected.tolist()[1] == -1 and found.selected.tolist()[0] >= 0
    assert float(found.delta2[1]) == 0 and found.sigma[1].isnan().all()
    assert found.sigma[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_refused(dtype):
    with pytest.raises(TypeError, match="float32"):
        solve_sigma(lambda x: x, images_of(1).to(dtype), torch.arange(1), SMALL, Key(0))
    with pytest.raises(TypeError, match="feature must be float32"):
        solve_sigma(lambda x: x.to(dtype), images_of(1), torch.arange(1), SMALL, Key(0))


def test_autocast_around_the_solver_changes_nothing():
    model = network()
    args = (lambda x: torch.relu(model(x)), images_of(1, 16), torch.arange(1))
    plain = solve_sigma(*args, replace(SMALL, steps=2), Key(0))
    with torch.autocast("cpu", torch.bfloat16):
        cast = solve_sigma(*args, replace(SMALL, steps=2), Key(0))
    assert torch.equal(plain.sigma, cast.sigma)


def test_impossible_settings():
    for wrong in ({"grid": 9}, {"samples": 0}, {"low": 0.0}, {"initial": 2.0}, {"lr": math.inf}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            solve_sigma(lambda x: x, images_of(1), torch.arange(1), replace(SMALL, **wrong), Key(0))


# Memory.

MEASURE = """
import sys, torch
sys.path.insert(0, "benchmarks")
from common import peak_bytes
from kdfast.models import fold_batch_norms
from kdfast.ops import Key
from kdfast.training.sigma import SigmaSettings, solve_sigma
from kdfast.training.sigma_memory import bytes_per_sample
layers = [torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
          torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32)]
model = torch.nn.Sequential(*layers).eval().requires_grad_(False)
images = torch.randn(2, 3, 64, 64)
settings = SigmaSettings(grid=16, samples=64, steps=1, more_steps=0)
for folded in (False, True):
    if folded:  # as networks are run by default
        model = fold_batch_norms(model, images[:1]).to(memory_format=torch.channels_last)
    phi = lambda x: torch.relu(model(x))
    said = 2 * 32 * bytes_per_sample(phi, images[:1])
    solve_sigma(phi, images, torch.arange(2), SigmaSettings(samples=2, steps=1), Key(0))
    step = lambda: solve_sigma(phi, images, torch.arange(2), settings, Key(0), chunk=32)
    print(peak_bytes(step, "cpu") / said)
"""


def test_peak_memory_is_what_the_formula_says():
    found = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    plain, folded = map(float, found.stdout.split())
    assert 0.6 < plain < 1.15 and 0.6 < folded < 1.15, found.stdout


def test_chunks_keep_to_the_budget():
    sample = bytes_per_sample(network(), images_of(1, 16))
    # Input 3x16x16 and its gradient, a map 8x14x14, the result 4x6x6.
    assert sample == 4 * (2 * 768 + 1568 + 3 * 144 + 2 * 1568)
    assert choose_chunk(100, 4, 96, 100 * 4 * 96) == 96
    assert choose_chunk(100, 4, 96, 100 * 4 * 40) == 32
    assert choose_chunk(100, 4, 96, 1) == 1


def test_a_pass_on_a_cpu_is_as_large_as_its_weights_or_64_mib():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    small, large = network(), torch.nn.Linear(1 << 15, 1 << 10, bias=False, device="meta")
    assert working_bytes(small, cpu, 4 * 2**30) == 2**26
    assert working_bytes(large, cpu, 4 * 2**30) == 2**27
    assert working_bytes(large, cpu, 2**20) == working_bytes(small, cpu, 2**20) == 2**20
    assert working_bytes(large, gpu, 4 * 2**30) == 4 * 2**30
