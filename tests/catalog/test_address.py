import pytest

from openmint.catalog.address import PolicyAddress, TinkerPath
from openmint.errors import InvalidRequest

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    "text",
    ["ann/math", "ann/math@prod", f"ann/math@{DIGEST}", f"ann/math@{DIGEST[:19]}"],
)
def test_an_address_reads_back_as_it_was_written(text: str) -> None:
    assert str(PolicyAddress.parse(text)) == text


def test_a_digest_is_told_from_an_alias() -> None:
    assert PolicyAddress.parse(f"ann/math@{DIGEST}").digest_prefix == DIGEST
    assert PolicyAddress.parse("ann/math@sha256").alias == "sha256"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "math",
        "ann/",
        "/math",
        "ann/math@",
        "ann/math/more",
        "Ann/math",
        "ann/../math",
        "ann/math@a@b",
        "ann/math@sha256:abc",
        "ann/math@sha256:" + "g" * 64,
        "ann/math@" + DIGEST + "0",
        "ann/math\n",
        "ann/ma\ud800th",
    ],
)
def test_what_is_no_address_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(InvalidRequest, match="tenant/policy@alias"):
        PolicyAddress.parse(text)


def test_a_tinker_path_reads_back_as_it_was_written() -> None:
    path = TinkerPath.parse("tinker://5e55:train:0/weights/step-10")
    assert (path.run_id, path.segment, path.name) == ("5e55:train:0", "weights", "step-10")
    assert str(path) == "tinker://5e55:train:0/weights/step-10"


@pytest.mark.parametrize(
    "text", ["tinker://a/weights", "a/weights/b", "tinker://a//b", "tinker://a/optimizer/b"]
)
def test_what_is_no_tinker_path_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        TinkerPath.parse(text)
