"""Which KV page belongs to whom, and which full pages can be shared.

A page may be shared by every sequence whose adapter and tokens up to its end are the same: its key
chains (revision, all earlier tokens, its own tokens). Another adapter gives the same text other
keys and values, so the revision is part of the key. Pages that nobody uses keep their content, and
are handed out again oldest first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from openmint.types import Digest

PageKey = bytes


def page_keys(revision: Digest | None, tokens: Sequence[int], page_tokens: int) -> list[PageKey]:
    """A key for each full page of `tokens`."""
    keys: list[PageKey] = []
    parent = (revision or "base").encode()
    for stop in range(page_tokens, len(tokens) + 1, page_tokens):
        text = ",".join(map(str, tokens[stop - page_tokens : stop])).encode()
        parent = hashlib.blake2b(parent + b"|" + text, digest_size=16).digest()
        keys.append(parent)
    return keys


class PagePool:
    """The book of a fixed number of pages. Every page is used (count > 0) or free, never both.

    Of the free ones those that nobody can find again go first, the one that was freed last before
    the others: so the prefix cache loses nothing for them, and memory that no wave of sequences
    needed yet is never touched.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._blank = list(reversed(range(num_pages)))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free pages that can be found by their key, the longest free first."""
        self._users: dict[int, int] = {}
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._users)

    def match(self, keys: Sequence[PageKey]) -> list[int]:
        """Pages of the longest cached run of `keys`, not yet taken."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Become one more user of cached pages."""
        for page in pages:
            self._cached.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1

    def take(self) -> int:
        """A page of one's own; its old content is forgotten. The caller checks `num_free`."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._users[page] = 1
        return page

    def remember(self, page: int, key: PageKey) -> None:
        """Offer a page that is now full to later sequences, unless its twin is already offered."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Stop using pages. Last pages go first, as a chain is only found from its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)

    def check_integrity(self) -> None:
        """Assert the invariants; tests call it after random operations."""
        free = [*self._blank, *self._cached]
        assert sorted([*free, *self._users]) == list(range(self.num_pages))
        assert self._cached.keys() <= self._key_of.keys()
        assert not self._key_of.keys() & set(self._blank)
        assert all(count > 0 for count in self._users.values())
        assert {page: key for key, page in self._page_of.items()} == self._key_of
