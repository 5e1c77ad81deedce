"""The page book under random use, against a plain model of it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from openmint.scheduler.pages import PagePool, page_keys
from openmint.types import Digest

PAGES = 6


class PageBook(RuleBasedStateMachine):
    """Holders take, share and release pages; the model knows each holder's pages and contents."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @precondition(lambda self: self.pool.num_free > 0)
    @rule()
    def take(self) -> None:
        page = self.pool.take()
        assert all(page not in pages for pages in self.held), "a used page was handed out"
        self.content.pop(page, None)
        self.held.append([page])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def remember(self, data: st.DataObject, key: bytes) -> None:
        page = data.draw(st.sampled_from(self.held))[0]
        known = key in self.content.values() or page in self.content
        self.pool.remember(page, key)
        if not known:
            self.content[page] = key

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=3, unique=True))
    def match_and_share(self, keys: list[bytes]) -> None:
        pages = self.pool.match(keys)
        page_of = {key: page for page, key in self.content.items()}
        expected = []
        for key in keys:
            if key not in page_of:
                break
            expected.append(page_of[key])
        assert pages == expected
        if pages:
            self.pool.share(pages)
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        self.held.remove(pages)
        self.pool.release(pages)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity()
        used = {page for pages in self.held for page in pages}
        assert self.pool.num_used == len(used)
        assert self.pool.num_free == PAGES - len(used)


TestPageBook = PageBook.TestCase
TestPageBook.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_chains_end_is_forgotten_before_its_beginning() -> None:
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    for page, key in zip(pages, (b"1", b"2", b"3"), strict=True):
        pool.remember(page, key)
    pool.release(pages)
    pool.take()
    assert pool.match([b"1", b"2", b"3"]) == pages[:2]


def test_pages_that_nobody_can_find_go_first_and_new_ones_last() -> None:
    pool = PagePool(4)
    cached, blank = pool.take(), pool.take()
    pool.remember(cached, b"1")
    pool.release([cached, blank])
    assert pool.take() == blank
    assert {pool.take(), pool.take()} == {0, 1, 2, 3} - {cached, blank}
    assert pool.match([b"1"]) == [cached]
    assert pool.take() == cached
    assert pool.match([b"1"]) == []


def test_keys_stand_for_full_pages_only() -> None:
    assert [len(page_keys(None, range(n), 4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_keys_agree_exactly_as_far_as_revision_and_tokens_do() -> None:
    tokens = list(range(100, 116))
    keys = page_keys(None, tokens, 4)
    assert len(set(keys)) == 4
    assert page_keys(None, [*tokens, 1, 2], 4) == keys
    changed = page_keys(None, [*tokens[:5], 0, *tokens[6:]], 4)
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True, False, False, False]
    for revision in (Digest("sha256:" + "0" * 64), Digest("sha256:" + "1" * 64)):
        other = page_keys(revision, tokens, 4)
        assert not set(other) & set(keys)
        assert other == page_keys(revision, tokens, 4)
    # The same digits cut otherwise are other tokens.
    assert page_keys(None, [1, 23], 2) != page_keys(None, [12, 3], 2)
    # The same page after another beginning holds other keys and values.
    assert page_keys(None, [7] * 8, 4)[0] != page_keys(None, [7] * 8, 4)[1]
