"""The caches of a stage, and whether they can give what it asks of them: known before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache.manifest import Manifest
from kdcache.cache.reader import CacheReader, open_cache
from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.models import check_student
from kdcache.targets import check_alignment
from kdcache.train.options import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIGNMENT_SAMPLE = 32


@dataclass(frozen=True, slots=True, eq=False)
class StageCaches:
    """What a stage reads.

    Attributes:
        caches: Of teachers with their weights, or of texts.
        eval_caches: Of held-out text.
        student_caches: Of text that the student wrote.
        rollout_caches: Of the passes in which it did.
    """

    caches: list[tuple[CacheReader, float]]
    eval_caches: list[tuple[CacheReader, float]]
    student_caches: list[CacheReader]
    rollout_caches: list[CacheReader]

    @staticmethod
    def of(options: TrainOptions) -> StageCaches:
        """Opened.

        Raises:
            CacheError: One cannot be.
        """
        return StageCaches(
            [(open_cache(path, allow_incomplete=options.allow_incomplete), w) for path, w in options.cache.items()],
            [(open_cache(path), weight) for path, weight in options.eval_cache.items()],
            [open_cache(path) for path in options.student_cache],
            [open_cache(path) for path in options.rollout_cache],
        )

    @property
    def read(self) -> list[CacheReader]:
        """Those whose sequences the student reads; a rollout cache only says how likely some of them were."""
        return [
            *(reader for reader, _ in self.caches),
            *self.student_caches,
            *(reader for reader, _ in self.eval_caches),
        ]

    def held_out(self, options: TrainOptions) -> Iterator[tuple[str, str, Manifest]]:
        """Option, path and manifest of the held-out ones."""
        for path, (reader, _) in zip(options.eval_cache, self.eval_caches, strict=True):
            yield "eval_cache", path, reader.manifest

    def trained_on(self, options: TrainOptions) -> Iterator[tuple[str, str, Manifest]]:
        """Option, path and manifest of all but the held-out ones."""
        readers = (
            ("cache", options.cache, [reader for reader, _ in self.caches]),
            ("student_cache", options.student_cache, self.student_caches),
            ("rollout_cache", options.rollout_cache, self.rollout_caches),
        )
        for option, paths, opened in readers:
            yield from ((option, path, reader.manifest) for path, reader in zip(paths, opened, strict=True))


def check_recipe(options: TrainOptions) -> StageCaches:
    """Open the caches of a stage, and refuse a loss, schedule, temperature or mix that they cannot give.

    Raises:
        ConfigError: They cannot.
        CacheError: A cache cannot be opened, or does not go with the others.
    """
    from kdcache.train.mix import group_caches
    from kdcache.train.recipe import Recipe

    recipe = Recipe.of(options.alpha, options.temperature, options.loss, options.loss_args)
    found = StageCaches.of(options)
    recipe.check(found.caches, found.eval_caches, found.student_caches, found.rollout_caches, mixed=bool(options.mix))
    if options.mix:
        _check_no_weights(options)
        group_caches(options.mix, [*(reader for reader, _ in found.caches), *found.student_caches])
    return found


def check_sequences(options: TrainOptions, found: StageCaches) -> None:
    """Refuse caches that hold nothing, targets of other tokens, or other sequences than the caches of further teachers.

    Raises:
        ConfigError: A cache is empty.
        CacheMismatchError: Its targets do not belong to its tokens, or two caches hold different sequences.
    """
    for one in [*(cache for cache, _ in found.caches), *found.student_caches, *found.rollout_caches]:
        _check_targets(one)
    if not options.mix:
        check_same_sequences([cache for cache, _ in found.caches])
    check_same_sequences([cache for cache, _ in found.eval_caches])


def check_reads(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, caches: Iterable[CacheReader]) -> None:
    """Refuse a student that does not speak the tokens of one of the caches, or cannot read its sequences.

    Raises:
        CacheMismatchError: Another tokenizer, fewer embeddings or a shorter context than one of them needs.
    """
    asked: dict[tuple[str, int, int], CacheReader] = {}
    for one in caches:
        asked.setdefault((one.spec.tokenizer.digest, one.vocab_size, one.spec.corpus.seq_len), one)
    for one in asked.values():
        try:
            check_student(model, tokenizer, one.spec.tokenizer, one.vocab_size, one.spec.corpus.seq_len)
        except CacheMismatchError as error:
            raise CacheMismatchError(f"{one.store}: {error.message}", hint=error.hint) from error


def _check_targets(reader: CacheReader) -> None:
    """Refuse an empty cache, and one whose targets do not belong to its tokens (a sample of sequences)."""
    if not len(reader):
        raise ConfigError(f"{reader.store}: the cache holds no sequences")
    for index in range(0, len(reader), max(1, len(reader) // ALIGNMENT_SAMPLE)):
        row = reader[index]
        tolerance = 2 * reader.codec.logprob_error_bound(row.targets.label_logprobs)
        check_alignment(row.sequence, row.targets, f"{reader.store}, sequence {index}", tolerance)


def _check_no_weights(options: TrainOptions) -> None:
    if weighted := [path for path, weight in options.cache.items() if weight != 1]:
        raise ConfigError(
            f"--cache {weighted[0]} has a weight, which belongs to several teachers over one text, and --mix gives shares to several texts",
            hint="leave the weight out, or leave --mix out",
        )


def check_same_sequences(readers: list[CacheReader]) -> None:
    """Several teachers' caches hold the same sequences, in whatever order.

    Raises:
        CacheMismatchError: They do not; names the first that is missing.
    """
    for other in readers[1:]:
        first = readers[0]
        missing = [h for h in first.content_hashes() if other.index_of(h) is None]
        if missing or len(other) != len(first):
            raise CacheMismatchError(
                f"{other.store} and {first.store} hold different sequences: {len(other)} and {len(first)} of them, "
                f"{len(missing)} of the latter are not in the former"
                + (f" (the first has content hash {missing[0]:016x})" if missing else ""),
                hint="caches of several teachers are made from the same dataset with the same --seq-len and packing; for caches of different "
                "texts say how much of each, as --mix teacher:0.7,real:0.3",
            )
