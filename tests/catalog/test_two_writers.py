"""Two processes write to one catalogue at once: what each reads before it writes still holds."""

from __future__ import annotations

import json
import subprocess
import sys

from openmint.catalog.catalog import Catalog
from tests.catalog.made import ANN

MOVES = 30
WRITE = """
import json, sys
from openmint.catalog.catalog import Catalog
from openmint.errors import Conflict
from tests.catalog.made import ANN, RUN, add_run, blob, digest_of

url, me, moves = sys.argv[1], sys.argv[2], int(sys.argv[3])
catalog = Catalog.open(url)
add_run(catalog)
made = [catalog.add_run_revision(ANN, RUN, blob(f"{me}{i}"), ephemeral=False) for i in range(moves)]
numbers = [revision.number for revision in made]
won, lost, version = [], 0, 0
while version < moves:
    try:
        moved = catalog.promote(
            ANN, "math", "prod", digest_of(f"{me}{version}"), actor=me, expected_version=version
        )
        won.append(moved.version)
    except Conflict:
        lost += 1
    version = catalog.alias(ANN, "math", "prod").version
catalog.close()
print(json.dumps({"numbers": numbers, "won": won, "lost": lost}))
"""


def test_of_two_processes_one_wins_each_version(empty_url: str) -> None:
    """Both make the database, the run and its revisions, and promote from the version they read."""
    command = [sys.executable, "-c", WRITE, empty_url]
    writers = [
        subprocess.Popen([*command, me, str(MOVES)], stdout=subprocess.PIPE, text=True)
        for me in "ab"
    ]
    said = [json.loads(writer.communicate()[0]) for writer in writers]
    assert sorted(said[0]["won"] + said[1]["won"]) == list(range(1, MOVES + 1))
    assert sorted(said[0]["numbers"] + said[1]["numbers"]) == list(range(1, 2 * MOVES + 1))
    catalog = Catalog.open(empty_url)
    events = catalog.alias_history(ANN, "math", "prod", limit=1000)[::-1]
    came_from = [event.from_digest for event in events]
    assert came_from == [None, *(event.to_digest for event in events[:-1])]
    made = [event for event in catalog.audit(ANN, limit=1000) if event.action == "policy.create"]
    assert len(made) == 1
    catalog.close()
