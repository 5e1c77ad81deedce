"""The catalogue under random use, beside a model in plain dictionaries: what each says must agree,
also after the database was closed and opened again in between."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Finished, Keep, RequestRecord, SavedState
from openmint.errors import Conflict, NotFound
from openmint.types import Digest, RunId, SessionId
from tests.catalog.conftest import NewUrl
from tests.catalog.made import ANN, BASE, add_run, blob, digest_of, size_of

POLICY = "math"
WORDS, NAMES = st.sampled_from("abcdefgh"), st.sampled_from(("one", "two", "three"))
ALIASES = st.sampled_from(("prod", "canary"))
SESSIONS = st.sampled_from(("s0", "s1", "s2"))


class Catalogue(RuleBasedStateMachine):
    """One policy, runs in three sessions, saves under three names, two aliases and `latest`."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.catalog = Catalog.open(self.url)
        self.runs: dict[str, RunId] = {}
        self.ended: set[str] = set()
        self.saves: dict[tuple[RunId, str], Digest] = {}
        self.live: set[Digest] = set()
        """Revisions that are not deleted."""
        self.stacks: dict[str, list[Digest]] = {}
        """What each alias named, below what it names now."""
        self.canaries: dict[str, Digest] = {}
        self.requests: dict[tuple[RunId, int], str] = {}
        self.snapshots: dict[RunId, SavedState] = {}

    def teardown(self) -> None:
        self.catalog.close()

    @initialize()
    def begin(self) -> None:
        self.add_run("s0")

    @rule(session=SESSIONS)
    def add_run(self, session: str) -> None:
        if session not in self.ended:
            self.runs[session] = add_run(self.catalog, session=session)

    @rule(session=SESSIONS, name=NAMES, word=WORDS, overwrite=st.booleans())
    def save(self, session: str, name: str, word: str, overwrite: bool) -> None:
        run = self.runs.get(session)
        if run is None:
            return
        saved = blob(word)
        known = self.saves.get((run, name))
        arguments = (ANN, run, "sampler_weights", name, saved)
        if known not in (None, saved.digest) and not overwrite:
            self.refuses(Conflict, self.catalog.add_checkpoint, *arguments)
            return
        self.catalog.add_checkpoint(*arguments, overwrite=overwrite)
        self.saves[run, name] = saved.digest
        self.live.add(saved.digest)
        self.move("latest", saved.digest)

    @rule(session=SESSIONS, name=NAMES)
    def delete_save(self, session: str, name: str) -> None:
        run = self.runs.get(session)
        if run is None:
            return
        arguments = (ANN, run, "sampler_weights", name)
        if (run, name) not in self.saves:
            self.refuses(NotFound, self.catalog.delete_checkpoint, *arguments, actor="t")
            return
        self.catalog.delete_checkpoint(*arguments, actor="t")
        digest = self.saves.pop((run, name))
        kept = set(self.saves.values()) | {stack[-1] for stack in self.stacks.values()}
        kept |= {each for alias in ("prod", "canary") for each in self.history_of(alias)}
        if digest not in kept:
            self.live.discard(digest)

    @rule(alias=ALIASES, word=WORDS)
    def promote(self, alias: str, word: str) -> None:
        digest = digest_of(word)
        if digest not in self.live:
            self.refuses(NotFound, self.catalog.promote, ANN, POLICY, alias, digest, actor="t")
            return
        named, canary = self.stacks.get(alias, [None])[-1], self.canaries.get(alias)
        if canary is not None and digest not in (named, canary):
            self.refuses(Conflict, self.catalog.promote, ANN, POLICY, alias, digest, actor="t")
            return
        self.catalog.promote(ANN, POLICY, alias, digest, actor="t")
        self.move(alias, digest)
        if digest == canary:
            del self.canaries[alias]

    @precondition(lambda self: self.stacks)
    @rule(alias=ALIASES, word=WORDS, share=st.sampled_from((0.1, 0.5, 0.9)))
    def try_canary(self, alias: str, word: str, share: float) -> None:
        digest = digest_of(word)
        arguments = (ANN, POLICY, alias, digest, share)
        if alias not in self.stacks or digest not in self.live:
            self.refuses(NotFound, self.catalog.set_canary, *arguments, actor="t")
        elif self.stacks[alias][-1] == digest or self.canaries.get(alias, digest) != digest:
            self.refuses(Conflict, self.catalog.set_canary, *arguments, actor="t")
        else:
            self.catalog.set_canary(*arguments, actor="t")
            self.canaries[alias] = digest
            self.seen[alias].append(digest)

    @precondition(lambda self: self.stacks)
    @rule(alias=ALIASES)
    def roll_back(self, alias: str) -> None:
        stack = self.stacks.get(alias, [])
        if alias in self.canaries:
            assert self.catalog.rollback(ANN, POLICY, alias, actor="t").digest == stack[-1]
            del self.canaries[alias]
            return
        if len(stack) < 2 or stack[-2] not in self.live:
            return
        self.catalog.rollback(ANN, POLICY, alias, actor="t")
        self.seen[alias].append(stack[-2])
        stack.pop()

    @rule(word=WORDS)
    def delete_revision(self, word: str) -> None:
        digest = digest_of(word)
        if digest not in self.live:
            self.refuses(NotFound, self.catalog.delete_revision, ANN, POLICY, digest, actor="t")
        elif digest in {*(stack[-1] for stack in self.stacks.values()), *self.canaries.values()}:
            self.refuses(Conflict, self.catalog.delete_revision, ANN, POLICY, digest, actor="t")
        else:
            self.catalog.delete_revision(ANN, POLICY, digest, actor="t")
            self.live.discard(digest)

    @rule(words=st.lists(WORDS, min_size=1, max_size=4))
    def import_some(self, words: list[str]) -> None:
        self.catalog.import_revisions(ANN, BASE, [(POLICY, blob(w)) for w in words], actor="t")
        for digest in map(digest_of, words):
            self.live.add(digest)
            self.move("latest", digest)

    @rule(keep=st.integers(1, 3))
    def retain(self, keep: int) -> None:
        """What goes is what it says beforehand."""
        surplus = self.catalog.surplus_revisions(ANN, POLICY, Keep(keep, 10))
        self.catalog.delete_surplus(Keep(keep, 10), after=0, limit=10)
        gone = {revision.digest for revision in surplus}
        self.live -= gone
        for key in [key for key, digest in self.saves.items() if digest in gone]:
            del self.saves[key]

    @rule(session=SESSIONS, seq=st.integers(1, 4), word=WORDS)
    def ask(self, session: str, seq: int, word: str) -> None:
        run = self.runs.get(session)
        if run is None or session in self.ended or (run, seq) in self.requests:
            return
        record = RequestRecord(
            run, seq, SessionId(session), ANN, f"{run}/{seq}", "kind", b"", "accepted", b"body",
            digest_of(word), None,
        )  # fmt: skip
        self.catalog.write_requests([record], [])
        self.requests[run, seq] = "accepted"

    @rule(session=SESSIONS, seq=st.integers(1, 4), keeps=st.booleans())
    def answer(self, session: str, seq: int, keeps: bool) -> None:
        run = self.runs.get(session)
        if run is None or self.requests.get((run, seq)) != "accepted":
            return
        self.catalog.write_requests([], [Finished(run, seq, "done", b"outcome", keeps)])
        self.requests[run, seq] = "kept" if keeps else "done"

    @rule(session=SESSIONS, word=WORDS, seq=st.integers(1, 4))
    def snapshot(self, session: str, word: str, seq: int) -> None:
        run = self.runs.get(session)
        before = [state for (r, s), state in self.requests.items() if r == run and s <= seq]
        if run is None or session in self.ended or "accepted" in before:
            return
        saved = SavedState(digest_of(word), seq)
        self.catalog.move_snapshot(run, saved)
        self.snapshots[run] = saved
        for at in [at for r, at in self.requests if r == run and at <= seq]:
            self.requests[run, at] = "done"

    @rule(session=SESSIONS)
    def end(self, session: str) -> None:
        run = self.runs.get(session)
        if run is None:
            return
        self.catalog.finish_session(ANN, SessionId(session), reason="success")
        self.ended.add(session)
        self.snapshots.pop(run, None)
        for key in [key for key in self.requests if key[0] == run]:
            del self.requests[key]

    @rule()
    def open_again(self) -> None:
        self.catalog.close()
        self.catalog = Catalog.open(self.url)

    @rule()
    def collect(self) -> None:
        """What may be deleted is named by nobody; it is taken as deleted."""
        unused = self.catalog.unused_blobs()
        assert not set(unused) & self.named()
        self.catalog.forget_blobs(unused)

    @invariant()
    def saves_agree(self) -> None:
        for run in self.runs.values():
            found = {(run, c.name): c.digest for c in self.catalog.run_checkpoints(ANN, run)}
            assert found == {key: value for key, value in self.saves.items() if key[0] == run}

    @invariant()
    def aliases_agree_and_name_revisions_that_are_there(self) -> None:
        found = {alias.name: alias.digest for alias in self.catalog.aliases(ANN, POLICY)}
        assert found == {name: stack[-1] for name, stack in self.stacks.items()}
        assert set(found.values()) <= self.live
        found = {alias.name: alias.canary_digest for alias in self.catalog.aliases(ANN, POLICY)}
        assert {name: canary for name, canary in found.items() if canary} == self.canaries
        assert set(self.canaries.values()) <= self.live

    @invariant()
    def revisions_agree(self) -> None:
        assert {r.digest for r in self.catalog.revisions(ANN, POLICY)} == self.live

    @invariant()
    def stored_bytes_are_those_of_saves_and_revisions_each_once(self) -> None:
        named = self.live | set(self.saves.values())
        assert self.catalog.stored_bytes(ANN) == sum(map(size_of, named))

    @invariant()
    def requests_agree(self) -> None:
        for run in self.runs.values():
            rows = {row.seq: row for row in self.catalog.requests_of(run)}
            assert {(run, seq) for seq in rows} == {key for key in self.requests if key[0] == run}
            for seq, row in rows.items():
                state = self.requests[run, seq]
                assert (row.body is None, row.outcome is None) == {
                    "accepted": (False, True),
                    "kept": (False, False),
                    "done": (True, False),
                }[state]
            assert self.catalog.snapshot_of(run) == self.snapshots.get(run)

    @property
    def seen(self) -> dict[str, list[Digest]]:
        if not hasattr(self, "_seen"):
            self._seen: dict[str, list[Digest]] = {"prod": [], "canary": [], "latest": []}
        return self._seen

    def move(self, alias: str, digest: Digest) -> None:
        stack = self.stacks.setdefault(alias, [])
        if not stack or stack[-1] != digest:
            stack.append(digest)
            self.seen[alias].append(digest)

    def history_of(self, alias: str) -> list[Digest]:
        return self.seen[alias]

    def named(self) -> set[Digest]:
        """Bytes that somebody may still ask for."""
        needed = {
            digest_of(word)
            for word in "abcdefgh"
            for run in self.runs.values()
            if any(row.needs == digest_of(word) for row in self.catalog.requests_of(run))
        }
        kept = {saved.digest for saved in self.snapshots.values()}
        return needed | kept | self.live | set(self.saves.values())

    @staticmethod
    def refuses(kind: type[Exception], call: object, *arguments: object, **more: object) -> None:
        try:
            call(*arguments, **more)  # type: ignore[operator]
        except kind:
            return
        raise AssertionError(f"{call} took what it should refuse")


def test_the_catalogue_agrees_with_the_model(new_url: NewUrl) -> None:
    run_state_machine_as_test(
        lambda: Catalogue(new_url()),
        settings=settings(max_examples=40, stateful_step_count=40, deadline=None),
    )
