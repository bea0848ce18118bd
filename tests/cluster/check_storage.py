"""The toy experiment where jobs share no files: all that they read and write lies in S3, here a
server on loopback. Its tables are those of a local run, and Kubernetes is planned the same jobs. No
test but a command, a part of `make test-cluster`; it takes some ten minutes."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from toy_chain import compare_tables, make_folder, snakemake  # noqa: E402

BUCKET, PREFIX = "fewlines", "here"
KEYS = ("any", "thing")
LIMIT = 2400  # seconds that a chain may take


def main() -> None:
    """Raises where a table or a plan differs, or a run does not end."""
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        bucket = make_bucket(address)
        storage = [
            *("--shared-fs-usage", "none", "--default-storage-provider", "s3"),
            *("--default-storage-prefix", f"s3://{BUCKET}/{PREFIX}"),
            *("--storage-s3-endpoint-url", address),
            *("--storage-s3-access-key", KEYS[0], "--storage-s3-secret-key", KEYS[1]),
        ]
        with tempfile.TemporaryDirectory(prefix="fewlines-storage-") as name:
            local, stored = (Path(name) / each for each in ("local", "stored"))
            make_folder(local), make_folder(stored)
            here = snakemake(local, "--dry-run")
            there = snakemake(stored, "--dry-run", "--executor", "kubernetes", "--jobs=8", *storage)
            assert count_jobs(here) == count_jobs(there) != {}
            outside = re.findall(rf"(?<!{BUCKET}/{PREFIX}/)\bresults/\S+", list_commands(there))
            assert not outside, f"not in the storage: {outside}"
            print(f"Kubernetes' plan: the same {count_jobs(there)['total']} jobs", flush=True)
            snakemake(local, "--cores=2", limit=LIMIT)
            snakemake(stored, "--cores=2", *storage, limit=LIMIT)
            assert not (stored / "results/toy/tables").exists()
            for each in bucket.objects.filter(Prefix=f"{PREFIX}/results/toy/tables/"):
                path = stored / each.key.removeprefix(f"{PREFIX}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                bucket.download_file(each.key, str(path))
            compare_tables(local, stored, run="toy")
    finally:
        server.stop()


def make_bucket(address: str):
    """Make the bucket that all files go to."""
    resource = boto3.resource(
        "s3",
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id=KEYS[0],
        aws_secret_access_key=KEYS[1],
    )
    return resource.create_bucket(Bucket=BUCKET)


def count_jobs(printed: str) -> dict[str, int]:
    """The jobs of each rule that a dry run lists."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", printed, re.M)}


def list_commands(printed: str) -> str:
    """The commands of a dry run."""
    return "\n".join(re.findall(r"^Shell command: (.*)$", printed, re.M))


if __name__ == "__main__":
    main()
