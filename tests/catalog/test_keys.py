import subprocess
import sys
from datetime import timedelta

import pytest
from sqlalchemy import select

from openmint.catalog.catalog import Catalog
from openmint.catalog.database import now
from openmint.catalog.records import Principal
from openmint.catalog.tables import METADATA
from openmint.errors import Forbidden, NotFound, Unauthenticated
from tests.catalog.made import ANN, BOB

CREATE = """
import sys
from openmint.catalog.catalog import Catalog
catalog = Catalog.open(sys.argv[1])
for _ in range(20):
    print(catalog.create_key(sys.argv[2], "train")[0])
catalog.close()
"""


def test_a_key_says_whose_it_is(catalog: Catalog) -> None:
    key, record = catalog.create_key(ANN, "serve", note="ci")
    assert key.startswith(f"tml-om_{record.key_id}_")
    assert catalog.authenticate(key) == Principal(ANN, "serve", record.key_id)
    assert catalog.keys(ANN) == [record]


def test_only_the_role_of_a_key_is_allowed() -> None:
    principal = Principal(ANN, "serve", "1")
    principal.require("serve", "train")
    Principal(ANN, "admin", "1").require("train")
    with pytest.raises(Forbidden, match=r"'serve'.*admin or train"):
        principal.require("train")


@pytest.mark.parametrize(
    "text", ["", "tml-om", "tml-om_", "tml-om__", "tml-om_0_0", "x" * 10_000, "\ud800_é_\ud800"]
)
def test_what_is_no_key_is_refused(catalog: Catalog, text: str) -> None:
    with pytest.raises(Unauthenticated):
        catalog.authenticate(text)


def test_a_changed_key_is_refused_in_the_same_words_as_an_unknown_one(catalog: Catalog) -> None:
    key, _ = catalog.create_key(ANN, "admin")
    messages = set()
    for wrong in (key[:-1], key + "x", key.replace("tml-om", "tml"), "tml-om_ffffffffffff_x"):
        with pytest.raises(Unauthenticated) as caught:
            catalog.authenticate(wrong)
        messages.add(caught.value.message)
    assert len(messages) == 1


def test_a_revoked_key_is_refused_for_good(catalog: Catalog) -> None:
    key, record = catalog.create_key(ANN, "admin")
    with pytest.raises(NotFound):
        catalog.revoke_key(BOB, record.key_id)
    catalog.revoke_key(ANN, record.key_id)
    catalog.revoke_key(ANN, record.key_id)
    with pytest.raises(Unauthenticated):
        catalog.authenticate(key)
    assert catalog.keys(ANN)[0].revoked_at is not None
    assert [event.action for event in catalog.audit(ANN)] == ["key.revoke", "key.create"]


def test_an_expired_key_is_refused(catalog: Catalog) -> None:
    key, _ = catalog.create_key(ANN, "admin", expires_at=now() - timedelta(seconds=1))
    with pytest.raises(Unauthenticated):
        catalog.authenticate(key)
    assert not catalog.has_keys()
    catalog.create_key(ANN, "admin", expires_at=now() + timedelta(hours=1))
    assert catalog.has_keys()


def test_the_database_does_not_hold_the_secret(catalog: Catalog) -> None:
    key, _ = catalog.create_key(ANN, "admin")
    with catalog._database.read() as connection:
        rows = [connection.execute(select(table)).all() for table in METADATA.sorted_tables]
    secret = key.split("_", 2)[2]
    assert len(secret) > 40 and secret not in str(rows)


def test_another_process_makes_keys_while_this_one_writes(catalog: Catalog, url: str) -> None:
    command = [sys.executable, "-c", CREATE, url]
    others = [
        subprocess.Popen([*command, tenant], stdout=subprocess.PIPE, text=True)
        for tenant in (ANN, BOB)
    ]
    own = []
    while any(other.poll() is None for other in others):
        own.append(catalog.create_key(ANN, "read")[0])
    for other, tenant in zip(others, (ANN, BOB), strict=True):
        keys = other.communicate()[0].split()
        assert other.returncode == 0
        assert len(keys) == 20
        assert {catalog.authenticate(key).tenant for key in keys} == {tenant}
    assert own
    assert {catalog.authenticate(key).role for key in own} == {"read"}


def test_two_processes_that_make_the_database_agree_on_it(empty_url: str) -> None:
    command = [sys.executable, "-c", CREATE, empty_url, ANN]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    keys = [key for other in others for key in other.communicate()[0].split()]
    catalog = Catalog.open(empty_url)
    assert len(keys) == 40
    assert {catalog.authenticate(key).tenant for key in keys} == {ANN}
    catalog.close()
