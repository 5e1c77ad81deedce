"""Archives of PEFT adapters: tars of ours, and what a tar of many may hold, read strictly."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from openmint.catalog.address import NAME
from openmint.errors import InvalidRequest

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_ADAPTERS = 1000
"""Most adapters of one archive."""
MAX_MEMBERS = 4 * MAX_ADAPTERS
"""Most files and folders."""
LAYOUT = f"POLICY/{{{CONFIG_FILE},{WEIGHTS_FILE}}} or POLICY/NAME/… for several of one policy"


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """A PEFT folder of an archive; `policy` is the first part of its path."""

    path: str
    policy: str
    config: bytes
    weights: bytes


def adapters_in(archive: bytes) -> list[PeftFolder]:
    """The adapters of a plain tar, in the order of their paths.

    Raises InvalidRequest for what is no such tar, for a member that is no ordinary file of a PEFT
    folder, for one that is there twice, half a folder, or too many.
    """
    folders: dict[str, dict[str, bytes]] = {}
    for path, data in _files_in(archive):
        files = folders.setdefault(str(path.parent), {})
        if path.name in files:
            raise InvalidRequest(f"the archive holds {_shown(str(path))} twice")
        if len(folders) > MAX_ADAPTERS:
            raise InvalidRequest(f"the archive holds over {MAX_ADAPTERS} adapters; send several")
        files[path.name] = data
    for folder, files in folders.items():
        if missing := {CONFIG_FILE, WEIGHTS_FILE} - set(files):
            raise InvalidRequest(f"{_shown(folder)} lacks {min(missing)}")
    return [
        PeftFolder(folder, folder.split("/")[0], files[CONFIG_FILE], files[WEIGHTS_FILE])
        for folder, files in sorted(folders.items())
    ]


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed tar; equal files give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _files_in(archive: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
            for number, member in enumerate(members):
                if number >= MAX_MEMBERS:
                    raise InvalidRequest(f"the archive has over {MAX_MEMBERS} members")
                if not member.isdir():
                    yield _checked(member), _content(members, member, len(archive))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise InvalidRequest(f"the body is not a plain tar: {error}") from None


def _checked(member: tarfile.TarInfo) -> PurePosixPath:
    """The path of an ordinary file of a PEFT folder. Raises InvalidRequest."""
    *folder, name = member.name.removeprefix("./").split("/")
    in_place = 1 <= len(folder) <= 2 and all(NAME.fullmatch(part) for part in folder)
    if not (in_place and name in (CONFIG_FILE, WEIGHTS_FILE)):
        raise InvalidRequest(f"the archive holds {_shown(member.name)}; its files are {LAYOUT}")
    if not member.isreg() or member.issparse():
        raise InvalidRequest(f"{_shown(member.name)} is not an ordinary file")
    return PurePosixPath(*folder, name)


def _content(members: tarfile.TarFile, member: tarfile.TarInfo, most_bytes: int) -> bytes:
    file = members.extractfile(member) if 0 <= member.size <= most_bytes else None
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise InvalidRequest(f"the archive ends within {_shown(member.name)}")
    return data


def _shown(path: str) -> str:
    return ascii(path[:200])
