"""Files of a Debian package, without root and without installing it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from fewlines.errors import FewlinesError

TIMEOUT = 300  # seconds, for one command


def fetch_package(package: str, folder: Path) -> Path:
    """Download a package into `folder` and unpack it there; returns the root of its files.

    Raises:
        FewlinesError: this is no Debian, or it cannot be had; with apt's last words.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FewlinesError("no apt-get here")
    print(f"fetching {package} from Debian's packages", file=sys.stderr)
    # Lists of our own, so that it works where the system's are empty or not ours to write.
    for sub in ("lists/partial", "cache/archives/partial"):
        (folder / sub).mkdir(parents=True)
    own = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
    try:
        _run(["apt-get", "download", package], folder)
    except FewlinesError:
        _run(["apt-get", *own, "update"], folder)
        _run(["apt-get", *own, "download", package], folder)
    (archive,) = folder.glob(f"{package}_*.deb")
    _run(["dpkg-deb", "-x", str(archive), str(folder / "unpacked")], folder)
    return folder / "unpacked"


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise FewlinesError(f"'{command[0]}' did not answer in {TIMEOUT} seconds") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FewlinesError(f"'{command[0]}' failed: {last}")
