"""Opens the store that is configured."""

from __future__ import annotations

from pathlib import Path

from openmint.errors import InvalidRequest
from openmint.store.blobs import BlobStore
from openmint.store.folder_store import FolderStore


def open_store(url: str, data: Path) -> BlobStore:
    """The store at a `store_url`, by default that inside the data folder. Asks no server.

    Raises InvalidRequest for a URL that names no store, or whose library is not installed.
    """
    if not url:
        return FolderStore(data)
    try:
        from openmint.store.s3_store import S3Store
    except ImportError as error:
        raise InvalidRequest(
            f"store_url is set, but what speaks S3 can't be loaded ({error}); "
            "pip install 'openmint[s3]'"
        ) from None
    return S3Store(url)
