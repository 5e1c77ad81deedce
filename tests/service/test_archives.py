"""A tar of many adapters is read strictly, whatever it holds."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from openmint.errors import InvalidRequest
from openmint.service.archives import (
    CONFIG_FILE,
    MAX_ADAPTERS,
    MAX_MEMBERS,
    WEIGHTS_FILE,
    adapters_in,
    tar_of,
)


def tar(*paths: str) -> bytes:
    return tar_of({path: path.encode() for path in paths})


def folder(path: str) -> tuple[str, str]:
    return f"{path}/{CONFIG_FILE}", f"{path}/{WEIGHTS_FILE}"


def odd_tar(kind: bytes, **fields: object) -> bytes:
    """A tar of one odd member beside a whole adapter."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in folder("fine"):
            entry = tarfile.TarInfo(path)
            archive.addfile(entry)
        odd = tarfile.TarInfo(f"odd/{CONFIG_FILE}")
        odd.type = kind
        for name, value in fields.items():
            setattr(odd, name, value)
        archive.addfile(odd)
    return buffer.getvalue()


def test_adapters_come_in_the_order_of_their_paths_with_their_policies() -> None:
    found = adapters_in(tar(*folder("b"), *folder("a/2"), *folder("a/1")))
    assert [(each.path, each.policy) for each in found] == [
        ("a/1", "a"),
        ("a/2", "a"),
        ("b", "b"),
    ]
    assert found[0].config == f"a/1/{CONFIG_FILE}".encode()
    assert found[0].weights == f"a/1/{WEIGHTS_FILE}".encode()


def test_folders_as_members_and_a_dot_before_paths_are_fine() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("./a")
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
        for path in folder("./a"):
            archive.addfile(tarfile.TarInfo(path))
    assert [each.path for each in adapters_in(buffer.getvalue())] == ["a"]


@pytest.mark.parametrize(
    "path",
    ["../a", "/a", "a/../b", "a//b", "a/b/c", "A", "a b", "", ".", "a/..", "ü", "a\x01"],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(InvalidRequest, match="the archive holds"):
        adapters_in(odd_tar(tarfile.REGTYPE, name=f"{path}/{CONFIG_FILE}"))


def test_other_files_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"adapter_model\.bin"):
        adapters_in(tar(*folder("a"), "a/adapter_model.bin"))


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_devices_and_sparse_files_are_refused(kind: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"ordinary|plain tar"):
        adapters_in(odd_tar(kind, linkname="/etc/passwd"))


def test_half_a_folder_and_one_that_is_there_twice_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=f"lacks {WEIGHTS_FILE}"):
        adapters_in(tar(folder("a")[0]))
    twice = odd_tar(tarfile.REGTYPE, name=f"fine/{CONFIG_FILE}")
    with pytest.raises(InvalidRequest, match="twice"):
        adapters_in(twice)


def test_too_many_are_refused() -> None:
    paths = [path for n in range(MAX_ADAPTERS + 1) for path in folder(f"p{n}")]
    with pytest.raises(InvalidRequest, match=f"over {MAX_ADAPTERS} adapters"):
        adapters_in(tar(*paths))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for n in range(MAX_MEMBERS + 1):
            entry = tarfile.TarInfo(f"d{n}")
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
    with pytest.raises(InvalidRequest, match="members"):
        adapters_in(buffer.getvalue())


def test_no_damage_is_worse_than_a_refusal() -> None:
    whole, drawn = tar(*folder("a"), *folder("b/1")), random.Random(0)
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(drawn.randint(1, 4)):
            damaged[drawn.randrange(len(damaged))] = drawn.randrange(256)
        if drawn.random() < 0.3:
            del damaged[drawn.randrange(len(damaged)) :]
        try:
            adapters_in(bytes(damaged))
        except InvalidRequest:
            continue
