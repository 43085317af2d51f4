"""Which shard next: what is not committed yet, as far as a worker knows, without listing all commits for each shard.

A listing of 100,000 commits is a hundred requests of an object store. So commits are listed once; a shard is looked up when it
comes up, and only when it turns out that others have been busy are all listed again, at most once a minute.
"""

from __future__ import annotations

import contextlib
import time

from kdcache.cache.commit import committed_shards
from kdcache.cache.layout import commit_name
from kdcache.cache.lease import Lease, claim
from kdcache.cache.store import Store

RELIST_SECONDS = 60.0


class Remaining:
    """The shards of a cache that are not known to be committed; false when there are none.

    Args:
        store: Where the cache is.
        num_shards: Of the plan.
        offset: Where to begin among them, a share of all: several workers do not begin at the same one.
    """

    def __init__(self, store: Store, num_shards: int, offset: float = 0.0) -> None:
        self._store, self._num_shards = store, num_shards
        left = self._list()
        first = int(offset * len(left))
        self._left = dict.fromkeys(left[first:] + left[:first])

    def __len__(self) -> int:
        return len(self._left)

    def claim(self) -> Lease | None:
        """The lease of the first shard that nobody has committed or holds; it is no longer among the remaining ones.

        Returns:
            None where live workers hold all that remain.
        """
        for shard in list(self._left):
            if shard not in self._left or self._is_committed(shard):
                continue
            lease = claim(self._store, shard)
            if lease is None:
                continue
            with contextlib.ExitStack() as given_back:
                given_back.enter_context(lease)
                if not self._is_committed(shard):  # between the look and the lease
                    del self._left[shard]
                    given_back.pop_all()
                    return lease
        return None

    def _is_committed(self, shard: int) -> bool:
        if not self._store.exists(commit_name(shard)):
            return False
        if time.monotonic() - self._listed > RELIST_SECONDS:
            left = set(self._list())
            self._left = {other: None for other in self._left if other in left}
        self._left.pop(shard, None)
        return True

    def _list(self) -> list[int]:
        self._listed = time.monotonic()
        done = committed_shards(self._store)
        return [shard for shard in range(self._num_shards) if shard not in done]
