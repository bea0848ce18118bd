"""FID, KID, IS, precision and recall by torch-fidelity, on the features of any network."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from fewlines.config.settings import QualitySettings
from fewlines.metrics.features import Features

METRICS = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "is": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}


class BareImages(Dataset[Tensor]):
    """Images alone, as torch-fidelity wants them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


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

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            raise NotImplementedError

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            features, logits = self.network(images)
            provided = {"features": features, "logits": logits}
            return tuple(provided[name] for name in self.features_list)

    if name not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor(name, Extractor)
    return name


def measure_quality(
    sets: Sequence[Tensor], reference: Tensor, features: Features, settings: QualitySettings
) -> list[dict[str, float]]:
    """Distances of each set of images from the reference, all `(n, C, H, W)` uint8.

    Returns:
        One dict per set with `fid`, `kid`, `is`, `precision`, `recall`.
    """
    extractor = register_extractor(features)
    results = []
    # The features of the reference are computed once, in a cache that lives as long as this call.
    with tempfile.TemporaryDirectory() as cache:
        for images in sets:
            found = torch_fidelity.calculate_metrics(
                input1=BareImages(images),
                input2=BareImages(reference),
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
                batch_size=500,
                cuda=torch.cuda.is_available(),
                save_cpu_ram=True,  # no worker processes for images that are in memory already
                verbose=False,
            )
            results.append({short: float(found[long]) for short, long in METRICS.items()})
    return results
