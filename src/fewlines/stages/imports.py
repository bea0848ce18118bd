"""Models and tokens that were made elsewhere."""

from __future__ import annotations

from pathlib import Path

from fewlines.files import write_json, write_tensors
from fewlines.integrations.llamagen import load_checkpoint, read_codes
from fewlines.models.checkpoint import save_network
from fewlines.models.shapes import published_shape


def import_model(checkpoint: Path, shape: str, grid: int, output: Path, metrics: Path) -> None:
    """Bring a checkpoint of LlamaGen into a file that every stage reads; `grid` is the tokens of a
    side that it was trained for."""
    network = load_checkpoint(checkpoint, published_shape(shape).on((grid, grid)))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    write_json(metrics, {"parameters": parameters, "trained": 0, "steps": 0})
    save_network(output, network)


def import_tokens(
    shape: str,
    grid: int,
    train_codes: Path,
    train_labels: Path,
    test_codes: Path,
    test_labels: Path,
    output: Path,
) -> None:
    """Bring codes and classes in .npy files into the file of tokens that every stage reads."""
    wanted = published_shape(shape).on((grid, grid))
    tensors = {}
    for name, files in (
        ("train", (train_codes, train_labels)),
        ("test", (test_codes, test_labels)),
    ):
        tensors[f"{name}_codes"], tensors[f"{name}_labels"] = read_codes(*files, wanted)
    header = {"grid": wanted.grid, "codes": wanted.codes, "classes": wanted.classes}
    write_tensors(output, tensors, header)
