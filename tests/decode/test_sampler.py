"""From logits to codes, stated a second time in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewlines.decode.sampler import CHUNK, Sampler, draw_noise

CODES = 12


def draw(sampler: Sampler, logits: np.ndarray, noise: float) -> int:
    """The code at which the distribution has passed so much of its mass, in the order of codes."""
    if sampler.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampler.temperature
    chance = np.exp(scaled - scaled.max())
    if 0 < sampler.top_k < len(chance):
        chance[scaled < np.sort(scaled)[-sampler.top_k]] = 0
    chance /= chance.sum()
    if sampler.top_p < 1:
        mass, kept = 0.0, np.zeros(len(chance), bool)
        for code in np.argsort(-chance, kind="stable"):
            if mass >= sampler.top_p:
                break
            kept[code], mass = True, mass + chance[code]
        chance = np.where(kept, chance, 0)
    return int(np.searchsorted(chance.cumsum() / chance.sum(), noise, side="right"))


SAMPLERS = [
    Sampler(temperature, top_k, top_p)
    for temperature in (0, 0.5, 1, 2)
    for top_k in (0, 1, 3, CODES, 99)
    for top_p in (0.3, 0.8, 1.0)
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_codes_are_drawn_by_the_inverse_of_what_is_left(sampler):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, CODES, generator=generator)
    noise = torch.rand(40, dtype=torch.float64, generator=generator)
    before = logits.clone()
    found = sampler(logits, noise)
    assert found.tolist() == [
        draw(sampler, row, chance)
        for row, chance in zip(logits.numpy(), noise.tolist(), strict=True)
    ]
    assert torch.equal(logits, before)


def test_equals_of_the_last_of_top_k_stay():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]]).expand(99, -1)
    noise = torch.linspace(0, 0.99, 99, dtype=torch.float64)
    assert set(Sampler(top_k=2)(logits, noise).tolist()) == {0, 1, 2}


def test_one_row_is_cut_as_many_are():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    for noise in (0.0, 0.2, 0.5):
        chance = torch.tensor([noise], dtype=torch.float64)
        assert Sampler(top_k=2)(logits, chance).item() >= 2


def test_top_p_ends_with_the_code_that_reaches_it():
    noise = torch.tensor([0.99], dtype=torch.float64)
    assert Sampler(top_p=0.5)(torch.zeros(1, 2), noise).item() == 0
    assert Sampler(top_p=0.51)(torch.zeros(1, 2), noise).item() == 1


def test_mass_is_summed_in_64_bits():
    """A code ends where its sum does, to the last of thousands."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    ends = logits.softmax(-1).double().cumsum(-1)[0]
    ends = ends / ends[-1]
    codes = torch.arange(0, 5000, 7)
    found = Sampler()(logits.expand(len(codes), -1), ends[codes] - 1e-12)
    assert torch.equal(found, codes)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("rows", [1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_many_rows_are_drawn_as_each_alone(rows, temperature):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, CODES, generator=generator)
    noise = torch.rand(rows, dtype=torch.float64, generator=generator)
    sampler = Sampler(temperature)
    alone = [sampler(logits[i : i + 1], noise[i : i + 1]) for i in range(rows)]
    assert torch.equal(sampler(logits, noise), torch.cat(alone))


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_not_finite_is_no_code(temperature):
    logits = torch.zeros(3, CODES)
    logits[1] = torch.nan
    logits[0, 2] = 5.0
    found = Sampler(temperature)(logits, torch.full((3,), 0.999, dtype=torch.float64))
    assert found[1] == CODES
    assert (found[[0, 2]] < CODES).all()


def test_the_ends_of_the_noise_are_codes_that_can_be():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    noise = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert Sampler()(logits, noise).tolist() == [1, 2]


def test_a_temperature_that_no_tensor_takes_is_taken():
    assert Sampler(temperature=10**30)(torch.zeros(1, 2), torch.tensor([0.7])).item() == 1


def test_guidance_leads_from_the_logits_without_a_class():
    logits = torch.randn(6, CODES, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(Sampler(guidance=1.0).guide(logits), logits[:3])
    torch.testing.assert_close(Sampler(guidance=0.0).guide(logits), logits[3:])
    torch.testing.assert_close(Sampler(guidance=2.0).guide(logits), 2 * logits[:3] - logits[3:])
    assert (Sampler().guided, Sampler(guidance=0).guided) == (False, True)


def test_noise_is_an_images_own():
    noise = draw_noise(3, range(5), 7)
    assert (noise.shape, noise.dtype) == ((5, 7), torch.float64)
    assert torch.equal(draw_noise(3, [4, 2], 7), noise[[4, 2]])
    assert not torch.equal(draw_noise(4, range(5), 7), noise)
    assert 0 <= noise.min() < noise.max() < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda runs it on the GPU")
@pytest.mark.parametrize("V", [7, 2048, 5000])
def test_the_kernel_of_a_gpu_draws_the_same_codes(V):
    """Interpreted. Chances lie in the middle of codes: at their borders rounding decides."""
    kernel = pytest.importorskip("fewlines.decode.triton_sampler")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, V, generator=generator)
    logits[1, : V // 2] = -torch.inf
    codes, held = torch.tensor([V - 1, V // 2, V - 2, 0, 1, 2, V // 3, V // 4]), torch.arange(8)
    logits[held, codes] += 6
    for temperature in (0.7, 1.0):
        ends = (logits / temperature).double().softmax(-1).cumsum(-1)
        below = torch.where(codes > 0, ends[held, (codes - 1).clamp(min=0)], 0.0)
        noise = (below + ends[held, codes]) / 2 / ends[:, -1]
        drawn = kernel.draw(logits, temperature, noise)
        assert torch.equal(drawn, codes)
        assert torch.equal(drawn, Sampler(temperature)(logits, noise))
    last = kernel.draw(logits, 1.0, torch.full((8,), 1 - 2.0**-53, dtype=torch.float64))
    assert last.max() < V
    for wrong in (torch.nan, torch.inf):
        logits[3, 1] = wrong
        assert kernel.draw(logits, 1.0, noise)[3] == V
