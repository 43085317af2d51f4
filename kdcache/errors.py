"""Every error kdcache raises, in one tree.

::

    KDCacheError
    ├── ConfigError             an option, a config file or a combination of options is not usable
    ├── CorpusError             the dataset cannot be read, or its rows are not what they should be
    ├── ModelError              a model or tokenizer cannot be loaded, or does not fit its purpose
    ├── TeacherOutputError      the teacher said NaN or Inf
    ├── StoreUnavailableError   a storage could not be asked or read: nothing is known about what it holds
    └── CacheError
        ├── CacheNotFoundError    there is no cache where one was named
        ├── CacheIncompleteError  planned shards are not committed yet
        ├── CacheCorruptError     bytes on disk are not the bytes that were committed
        ├── CacheMismatchError    two things that must agree do not: cache and plan, cache and student
        ├── CacheFormatError      written by a format version or codec that this kdcache does not know
        └── StoreError            the storage cannot do what a cache needs of it

A message says what was expected, what was found and where; ``hint`` names the step that mends it. The command line turns
these into exit code 1 in one place. ``ValueError`` and ``assert`` are left for mistakes of programmers.
"""

from __future__ import annotations


class KDCacheError(Exception):
    """Base of every error that a user of kdcache can meet.

    Args:
        message: What was expected, what was found, where.
        hint: The command or change that mends it, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel from worker processes; the default __reduce__ would drop the keyword.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[KDCacheError], message: str, hint: str | None) -> KDCacheError:
    return kind(message, hint=hint)


class ConfigError(KDCacheError):
    """An option, a config file or a combination of options is not usable."""


class CorpusError(KDCacheError):
    """The dataset cannot be read, or its rows are not what they should be."""


class ModelError(KDCacheError):
    """A model or tokenizer cannot be loaded, or does not fit its purpose."""


class TeacherOutputError(KDCacheError):
    """The teacher produced NaN or Inf logits."""


class CacheError(KDCacheError):
    """Something is wrong with a cache on disk."""


class CacheNotFoundError(CacheError):
    """There is no cache where one was named."""


class CacheIncompleteError(CacheError):
    """Planned shards are not committed yet."""


class CacheCorruptError(CacheError):
    """Bytes on disk are not the bytes that were committed."""


class CacheMismatchError(CacheError):
    """Two things that must agree do not: cache and plan, cache and student, two caches."""


class CacheFormatError(CacheError):
    """Written by a format version or codec that this kdcache does not know."""


class StoreError(CacheError):
    """The storage cannot do what a cache needs of it."""


class StoreUnavailableError(KDCacheError):
    """The storage could not be asked or read, gave no permission, or no local copy could be kept: nothing is known about what it holds.

    No CacheError: an audit that meets it has found nothing wrong with a cache.
    """
