"""The nearest training images, against all pairs."""

from __future__ import annotations

import pytest
import torch

from fewlines.metrics import neighbours
from fewlines.metrics.features import Features
from fewlines.metrics.neighbours import find_neighbours


class Means(torch.nn.Module):
    """Features of an image: the means of its columns."""

    def forward(self, images):
        return images.float().mean((1, 2)), images.float().mean((1, 2, 3))


@pytest.mark.parametrize("batch", [3, 500])
def test_the_nearest_of_all_pairs_is_found_whatever_the_batch(batch, monkeypatch):
    monkeypatch.setattr(neighbours, "BATCH", batch)
    generator = torch.Generator().manual_seed(0)
    images, among = (
        torch.randint(256, (count, 3, 6, 4), dtype=torch.uint8, generator=generator)
        for count in (7, 20)
    )
    among[11] = images[4]
    found = find_neighbours(images, among, Features("means", Means()))
    pixels = (images[:, None].double() - among).div(255).square().mean((2, 3, 4)).sqrt()
    columns = images.double().mean((1, 2))[:, None] - among.double().mean((1, 2))
    for space, distances in (("pixels", pixels), ("features", columns.norm(dim=2))):
        assert torch.equal(found[space].rows, distances.argmin(1))
        assert torch.allclose(found[space].distances.double(), distances.amin(1), atol=1e-4)
        assert found[space].rows[4] == 11
        assert found[space].distances[4] == 0


def test_features_are_of_images_at_the_side_asked_for():
    sides = []

    class Watched(Means):
        def forward(self, images):
            sides.append(images.shape[-1])
            return super().forward(images)

    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    find_neighbours(images, images, Features("means", Watched()), side=8)
    assert set(sides) == {8}
