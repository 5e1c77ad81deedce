"""Files that are hashed while they are read."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from openmint.store.folders import LARGE_BYTES, PART_BYTES, read_hashed


@pytest.mark.parametrize(
    "num_bytes",
    [0, 1, PART_BYTES, LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 2 * PART_BYTES + 5],
)
def test_the_bytes_and_their_hash(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "file"
    expected = np.random.default_rng(num_bytes).bytes(num_bytes)
    path.write_bytes(expected)
    data, sha256 = read_hashed(path)
    assert data == expected
    assert sha256 == hashlib.sha256(expected).hexdigest()
    assert not data.readonly
