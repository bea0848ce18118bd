"""What ten and a hundred thousand images take of memory and time: read from archives, tokenised,
judged. No test but a command: it takes a quarter of an hour. Memory is what a process has of its
own; pages of files that it has mapped are the system's to take back."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image

from fewlines.files import write_tensors
from fewlines.models.checkpoint import save_network
from fewlines.models.classifier import Classifier, ClassifierShape
from fewlines.models.tokenizer import ConvTokenizer, TokenizerShape

COUNTS = (10_000, 100_000)
SIDE, CLASSES, CODES = 32, 10, 256
FEWLINES = str(Path(sys.executable).with_name("fewlines"))


def main() -> None:
    """Prints a table: stage, images, seconds, megabytes of the process at its peak."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fewlines-large-") as name:
        for count in COUNTS:
            folder = Path(name) / str(count)
            prepare(folder, count)
            for stage, options in list_stages(folder):
                seconds, peak = watch([FEWLINES, stage, "--threads=2", *options])
                rows.append({"stage": stage, "images": count, "seconds": seconds, "MB": peak / 1e6})
                print(rows[-1], flush=True)
    print(pd.DataFrame(rows).round(1).to_markdown(index=False))


def prepare(folder: Path, count: int) -> None:
    """Archives of noise, networks without training, and as many drawn codes."""
    (folder / "tars").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(10):
        with tarfile.open(folder / f"tars/{number}.tar", "w") as tar:
            for each in range(count // 8):  # a quarter more, as a tenth is held out
                content = io.BytesIO()
                noise = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                Image.fromarray(noise).save(content, "PNG", compress_level=1)
                for ending, part in (("png", content.getvalue()), ("cls", b"%d" % (each % 10))):
                    facts = tarfile.TarInfo(f"{number}-{each}.{ending}")
                    facts.size = len(part)
                    tar.addfile(facts, io.BytesIO(part))
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(TokenizerShape(3, (16, 32), 0, CODES, 8))
    save_network(folder / "tokenizer", tokenizer)
    save_network(folder / "classifier", Classifier(ClassifierShape(3, (16, 32), 64, CLASSES)))
    codes = torch.randint(CODES, (count, (SIDE // 2) ** 2), dtype=torch.int32)
    write_tensors(folder / "samples", {"seed_0": codes}, {"grid": [SIDE // 2, SIDE // 2]})
    settings = f"sampling: {{samples: {count}, seeds: [0]}}\nquality: {{kid_subsets: 2}}\n"
    (folder / "config.yaml").write_text(settings)


def list_stages(folder: Path) -> list[tuple[str, list[str]]]:
    """Commands, one after another."""
    images, tokenizer = f"--images={folder / 'images'}", f"--tokenizer={folder / 'tokenizer'}"
    fetch = ["--source=webdataset", f"--path={folder / 'tars'}", f"--side={SIDE}"]
    judge = [f"--config={folder / 'config.yaml'}", f"--samples={folder / 'samples'}"]
    judge += [images, tokenizer, f"--classifier={folder / 'classifier'}"]
    return [
        ("fetch-data", [*fetch, f"--output={folder / 'images'}"]),
        ("tokenize", [images, tokenizer, f"--output={folder / 'tokens'}"]),
        ("measure-quality", [*judge, f"--output={folder / 'quality.json'}"]),
    ]


def watch(command: list[str]) -> tuple[float, int]:
    """Run a command; returns its seconds and the most bytes that it had of its own."""
    start, peak = time.monotonic(), 0
    process = psutil.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None:
        try:
            facts = process.memory_info()
            peak = max(peak, facts.rss - facts.shared)
        except psutil.Error:
            break
        time.sleep(0.05)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    return time.monotonic() - start, peak


if __name__ == "__main__":
    main()
