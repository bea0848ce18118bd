"""FID, KID, IS, precision and recall by torch-fidelity, on the features of any network."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from fewlines.config.settings import QualitySettings
from fewlines.errors import FewlinesError
from fewlines.files import parse
from fewlines.metrics.features import Features

BATCH = 500  # images whose features are computed at once
PAIRS = 25_000_000  # of images whose distances are held at once
METRICS = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "is": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}


class Images(Protocol):
    """Images `(n, C, H, W)` uint8, of which some are asked for at a time; a tensor is such."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: list[int]) -> Tensor: ...


class BareImages(Dataset[Tensor]):
    """Images alone, as torch-fidelity wants them: of a batch that is asked for, and no others."""

    def __init__(self, images: Images, side: int | None = None) -> None:
        """Bring images to a side, where one is given."""
        self.images, self.side = images, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        """Images of a batch, as torch's loaders ask for it."""
        images = self.images[rows]
        return list(images if self.side is None else resize(images, self.side))


def register_extractor(of: Features) -> str:
    """Make a network known to torch-fidelity: features, and logits for IS."""
    name = f"fewlines-{of.name.replace(' ', '-')}"

    class Extractor(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.network = copy.deepcopy(of.network)  # torch-fidelity moves it to a GPU

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            features, logits = self.network(images)
            provided = {"features": features, "logits": logits}
            return tuple(provided[name] for name in self.features_list)

    if name not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor(name, Extractor)
    return name


def resize(images: Tensor, side: int) -> Tensor:
    """Bring images `(n, C, H, W)` uint8 to a side, bicubically and without aliases."""
    if images.shape[-2:] == (side, side):
        return images
    resized = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def read_statistics(path: Path, features: int) -> dict[str, Any]:
    """Read `mu` `(F,)` and `sigma` `(F, F)` of a reference, as ADM's evaluation publishes them.

    Args:
        path: a `.npz` file.
        features: numbers of a feature.

    Raises:
        FewlinesError: it is no such file, or of other features.
    """
    found = parse(path, lambda each: dict(np.load(each)), "a .npz file of numbers")
    if not {"mu", "sigma"} <= set(found):
        raise FewlinesError(f"{path} has {', '.join(found)}; wanted are mu and sigma")
    mu, sigma = (np.asarray(found[name], dtype=np.float64) for name in ("mu", "sigma"))
    if mu.shape != (features,) or sigma.shape != (features, features):
        raise FewlinesError(
            f"{path}: mu of {mu.shape} and sigma of {sigma.shape} are not of the {features} "
            "features that quality.features has"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise FewlinesError(f"{path}: numbers that are not finite")
    return {"mu": mu.astype(np.float32), "sigma": sigma}  # as means of float32 features are


def count_numbers(features: Features, images: Images) -> int:
    """Count the numbers of a feature."""
    return int(features.network(images[[0]])[0].shape[1])


def measure_quality(
    sets: Sequence[Images], reference: Images, features: Features, settings: QualitySettings
) -> list[dict[str, float]]:
    """Distances of each set of images from the reference, all `(n, C, H, W)` uint8. Of all images
    only features are held.

    Returns:
        One dict per set with `fid`, `kid`, `is`, `precision`, `recall`.

    Raises:
        FewlinesError: the file of `quality.reference` is not of these features.
    """
    extractor = register_extractor(features)
    known = None
    if settings.reference:
        known = read_statistics(settings.reference, count_numbers(features, reference))
    results = []
    # The features of the reference are computed once, in a cache that lives as long as this call.
    with tempfile.TemporaryDirectory() as cache:
        if known:  # as torch-fidelity keeps what it found of images itself
            torch.save(known, Path(cache) / f"reference-{extractor}-stat-fid-features.pt")
        for images in sets:
            found = torch_fidelity.calculate_metrics(
                input1=BareImages(images, settings.side),
                input2=BareImages(reference, settings.side),
                input2_cache_name="reference",
                cache_root=cache,
                feature_extractor=extractor,
                isc=True,
                fid=True,
                kid=True,
                prc=True,
                kid_subsets=settings.kid_subsets,
                kid_subset_size=settings.kid_subset_size,
                prc_neighborhood=settings.neighbours,
                prc_batch_size=min(10_000, max(1, PAIRS // max(len(images), len(reference)))),
                batch_size=BATCH,
                cuda=torch.cuda.is_available(),
                save_cpu_ram=True,  # no worker processes
                verbose=False,
            )
            results.append({short: float(found[long]) for short, long in METRICS.items()})
    return results
