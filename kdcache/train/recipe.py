"""What a whole run is trained for: loss, alpha and temperature over its course, and whether its caches can give that."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kdcache.cache.reader import CacheReader
from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.targets import temperature_index
from kdcache.train.losses import (
    Divergence,
    check_estimator,
    make_divergence,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
from kdcache.train.objective import Objective, PolicyGradient
from kdcache.train.options import TWO_TEXT_LOSSES
from kdcache.train.schedule import Schedule, parse_schedule

logger = logging.getLogger(__name__)

CONTRASTIVE, MINILLM = TWO_TEXT_LOSSES
CONTRASTIVE_ARGS = {"skew": 0.1, "balance": 1.0}
MINILLM_ARGS = {"single_step": 1.0, "long_term": 1.0, "clip": 0.2}

WeightedReaders = list[tuple[CacheReader, float]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The objective of every step.

    Attributes:
        loss: Name of the divergence.
        alpha: Weight of the teacher.
        temperature: T.
        loss_args: Arguments of the divergence.
    """

    loss: str
    alpha: Schedule
    temperature: Schedule
    loss_args: Mapping[str, Schedule]

    @staticmethod
    def of(
        alpha: float | str | Schedule,
        temperature: float | str | Schedule,
        loss: str,
        loss_args: Mapping[str, float | str] | None,
    ) -> Recipe:
        """From numbers or schedules.

        Raises:
            ConfigError: A number out of its range, an unknown loss or argument, or ``minillm`` without a weight.
        """
        try:
            arguments = {name: parse_schedule(value) for name, value in (loss_args or {}).items()}
            recipe = Recipe(loss, parse_schedule(alpha), parse_schedule(temperature), arguments)
        except ValueError as error:
            raise ConfigError(f"alpha, temperature or an argument of the loss: {error}") from error
        if not all(0 <= value <= 1 for value in recipe.alpha.values):
            raise ConfigError(f"alpha is between 0 and 1, found {recipe.alpha}")
        if not all(value > 0 for value in recipe.temperature.values):
            raise ConfigError(f"temperature is above 0, found {recipe.temperature}")
        if loss == MINILLM and not recipe.uses_teacher:
            raise ConfigError(
                f"loss {MINILLM} has weight alpha on the student's own text, found alpha {recipe.alpha}: nothing of it is left but the "
                "cross-entropy of the real text",
                hint="an alpha above 0; or, for labels alone, --alpha 0 with another loss and without --student-cache",
            )
        for share in (0.0, 1.0):
            recipe._divergences(share)
        return recipe

    @property
    def uses_teacher(self) -> bool:
        """Whether targets are needed at all."""
        return self.loss != "ce" and any(value > 0 for value in self.alpha.values)

    def at(self, progress: float, caches: WeightedReaders) -> Objective:
        """What counts when ``progress`` of the run is done. A temperature on its way takes the nearest declared one."""
        alpha = self.alpha.at(progress) if self.uses_teacher else 0.0
        temperature = self.temperature.at(progress)
        if not self.temperature.is_constant and (declared := declared_temperatures(caches)):
            temperature = min(declared, key=lambda one: abs(math.log(one / temperature)))
        if self.loss == MINILLM:
            return self._minillm(alpha, temperature, progress)
        divergence, on_student_text, balance = self._divergences(progress)
        if on_student_text is None:
            return Objective(alpha, temperature, divergence)
        student_side = Objective(alpha, temperature, on_student_text, weight=balance)
        return Objective(alpha, temperature, divergence, weight=2 - balance, on_student_text=student_side)

    def _minillm(self, alpha: float, temperature: float, progress: float) -> Objective:
        """Policy gradient on the student's text, weight alpha; labels elsewhere, the pre-training loss, weight ``1 - alpha``."""
        own = PolicyGradient(**self._arguments(MINILLM_ARGS, progress))
        on_student_text = Objective(1.0, temperature, reverse_kl(), weight=alpha, policy=own)
        return Objective(0.0, temperature, reverse_kl(), weight=1 - alpha, on_student_text=on_student_text)

    @property
    def measured(self) -> str:
        """Name of the divergence that is logged."""
        return "reverse_kl" if self.loss == MINILLM else self.loss

    def moving(self, objective: Objective) -> dict[str, float]:
        """What is scheduled, and where it stands: for the log."""
        now = {"alpha": (self.alpha, objective.alpha), "temperature": (self.temperature, objective.temperature)}
        return {name: value for name, (schedule, value) in now.items() if not schedule.is_constant}

    def check(
        self,
        caches: WeightedReaders,
        eval_caches: WeightedReaders,
        student_caches: Sequence[CacheReader] = (),
        rollouts: Sequence[CacheReader] = (),
        *,
        mixed: bool = False,
    ) -> None:
        """Refuse what the caches cannot give.

        Args:
            caches: Of several teachers, or of several texts.
            eval_caches: Of held-out text.
            student_caches: Of text that the student wrote.
            rollouts: Of the passes in which it did.
            mixed: Whether ``caches`` are of several texts.

        Raises:
            ConfigError: A temperature that is not declared, or a loss that drawn targets do not allow.
            CacheMismatchError: Caches of different tokenizers, of targets that are not decoded alike, or of rollouts that were not
                sampled as the loss takes them to be.
        """
        self._check_student_caches(caches, student_caches, rollouts, mixed)
        first = caches[0][0]
        texts = [*student_caches, *(reader for reader, _ in caches if mixed)]
        for reader in [*(reader for reader, _ in [*caches, *eval_caches]), *student_caches, *rollouts]:
            if reader.spec.tokenizer.digest != first.spec.tokenizer.digest:
                raise CacheMismatchError(
                    f"{reader.store} and {first.store} were made with different tokenizers: "
                    f"{reader.spec.tokenizer.digest[:12]} and {first.spec.tokenizer.digest[:12]}"
                )
            if reader.vocab_size != first.vocab_size:
                raise CacheMismatchError(
                    f"{reader.store} has targets over {reader.vocab_size} tokens, {first.store} over {first.vocab_size}"
                )
            if self.uses_teacher and reader not in rollouts:
                self._check_cache(reader)
        for reader in texts if self.uses_teacher else []:
            _check_decoded_alike(reader, first)

    def _check_student_caches(
        self,
        caches: WeightedReaders,
        student_caches: Sequence[CacheReader],
        rollouts: Sequence[CacheReader],
        mixed: bool,
    ) -> None:
        needs = self.loss in TWO_TEXT_LOSSES
        if needs != bool(student_caches):
            raise ConfigError(
                f"the losses {CONTRASTIVE} and {MINILLM} need a cache of text that the student wrote, and nothing else takes one",
                hint=f"--loss {self.loss if needs else CONTRASTIVE} --cache TEXT --student-cache STUDENT_TEXT",
            )
        if student_caches and len(caches) > 1 and not mixed:
            raise ConfigError(f"the loss {self.loss} takes one teacher, several caches were named")
        if self.loss != MINILLM:
            return
        if self.temperature.values != (1.0,):
            raise ConfigError(
                f"loss {MINILLM} is at T = 1, where text is sampled; found temperature {self.temperature}"
            )
        for reader in rollouts:
            _check_plainly_sampled(reader)
            _warn_of_selection(reader)
        for reader in student_caches:
            missing = sum(all(r.index_of(h) is None for r in rollouts) for h in reader.content_hashes())
            if missing:
                raise CacheMismatchError(
                    f"{reader.store}: of {missing} of {len(reader)} sequences nobody knows with which probability the student wrote "
                    "them",
                    hint="--rollout-cache names what kdcache generate --teacher STUDENT left, and --student-cache a dump of it",
                )

    def _check_cache(self, reader: CacheReader) -> None:
        if reader.spec.targets.scheme == "hidden":
            return
        if self.temperature.is_constant:
            temperature_index(reader.temperatures, self.temperature.values[0])
        for divergence in self._divergences(0.0)[:2]:
            if divergence is not None:
                check_estimator(divergence, reader.spec.targets.estimator, str(reader.store))

    def _divergences(self, progress: float) -> tuple[Divergence, Divergence | None, float]:
        """On the teacher's text (or any text), on the student's, and the balance of the two."""
        if self.loss == MINILLM:
            self._arguments(MINILLM_ARGS, progress)
            return reverse_kl(), None, 1.0
        if self.loss != CONTRASTIVE:
            return (
                make_divergence(self.loss, {n: schedule.at(progress) for n, schedule in self.loss_args.items()}),
                None,
                1.0,
            )
        given = self._arguments(CONTRASTIVE_ARGS, progress)
        if not 0 <= given["balance"] <= 2:
            raise ConfigError(f"loss {CONTRASTIVE}: balance is between 0 and 2, found {given['balance']:g}")
        return skew_kl(given["skew"]), skew_reverse_kl(given["skew"]), given["balance"]

    def _arguments(self, defaults: Mapping[str, float], progress: float) -> dict[str, float]:
        """Arguments of a loss of two texts."""
        given = {name: schedule.at(progress) for name, schedule in self.loss_args.items()}
        if unknown := [name for name in given if name not in defaults]:
            raise ConfigError(
                f"loss {self.loss} has no argument {unknown[0]!r}", hint=f"it takes {', '.join(defaults)}"
            )
        if negative := [name for name, value in given.items() if value < 0]:
            raise ConfigError(f"loss {self.loss}: {negative[0]} is at least 0, found {given[negative[0]]:g}")
        return dict(defaults) | given


def declared_temperatures(caches: WeightedReaders) -> list[float] | None:
    """Temperatures that every cache declares; None where all hold hidden states, from which any is exact."""
    sets = [set(reader.temperatures) for reader, _ in caches if reader.spec.targets.scheme != "hidden"]
    return sorted(set.intersection(*sets)) if sets else None


def weighted(caches: CacheReader | Sequence[tuple[CacheReader, float]]) -> WeightedReaders:
    """One cache, or several with weights that are divided by their sum."""
    if isinstance(caches, CacheReader):
        return [(caches, 1.0)]
    total = sum(weight for _, weight in caches)
    return [(reader, weight / total) for reader, weight in caches]


def _check_decoded_alike(reader: CacheReader, first: CacheReader) -> None:
    """Refuse a text whose targets another text's decoder would take for other numbers: a batch is decoded by one."""
    ours, theirs = _decoding(reader), _decoding(first)
    if differing := [name for name in ours if ours[name] != theirs[name]]:
        found = "; ".join(f"{name} {ours[name]}, and {theirs[name]}" for name in differing)
        raise CacheMismatchError(
            f"{reader.store} and {first.store} hold targets that are not decoded alike: {found}",
            hint="dump both with the same --targets, --top-k, --temperatures, --codec, --quality and --entry-logprobs; or make one like the "
            "other with kdcache transcode, which cuts entries, temperatures and entry logprobs, and takes a --quality for the levels",
        )


def _decoding(reader: CacheReader) -> dict[str, object]:
    """All that :class:`~kdcache.train.stream.TargetDecoder` and ``collate`` take from a cache, by the name that an error gives it."""
    targets, codec = reader.spec.targets, reader.codec
    levels = "none"
    if targets.frequencies:
        levels = f"counts in {codec.count_dtype.__name__}"
    elif codec.name == "packed":
        levels = f"of {codec.levels.step:.4g} nats growing by {codec.levels.growth:.4g}"
    return {
        "targets": targets.scheme,
        "temperatures": ", ".join(f"{temperature:g}" for temperature in targets.temperatures),
        "codec": codec.name,
        "entry logprobs": "no" if targets.frequencies else "yes",
        "levels": levels,
        "hidden states": codec.hidden_dtype if codec.hidden_size else "none",
        "output head": reader.manifest.head_digest,
    }


def _check_plainly_sampled(reader: CacheReader) -> None:
    """Refuse rollouts whose text was not drawn from the probabilities that are stored beside it."""
    spec = reader.spec.generation
    if spec is None:
        return
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    if differing := {name: getattr(spec, name) for name, value in plain.items() if getattr(spec, name) != value}:
        found = ", ".join(f"{name} {value:g}" for name, value in differing.items())
        raise CacheMismatchError(
            f"{reader.store}: loss {MINILLM} weighs text by the probability with which it was sampled, and this was sampled with {found}, "
            "while the stored probabilities are the student's own",
            hint="kdcache generate --sample-temperature 1 --sample-top-p 1 --sample-top-k 0 --repetition-penalty 1, its defaults",
        )


def _warn_of_selection(reader: CacheReader) -> None:
    """Say which answers were dropped for what they are: those that are left are not drawn from the student any more."""
    spec, stats = reader.spec.generation, reader.manifest.stats
    if spec is None:
        return
    dropped = {
        f"--min-tokens {spec.min_tokens}": stats.num_answers_short,  # of 1: those that end at once, whose end is a target too
        f"--max-repetition {spec.max_repetition:g}": stats.num_answers_repetitive,
        "--no-keep-unfinished": stats.num_answers_unfinished,
        f"--no-keep-duplicates of {spec.num_answers} answers a prompt": stats.num_answers_duplicate,
    }
    if found := ", ".join(f"{number:,} by {name}" for name, number in dropped.items() if number):
        _warn_once(
            f"{reader.store}: loss {MINILLM} takes rollouts for what the student writes, and of these some were dropped after they were "
            f"sampled: {found}. It leans toward those that are left"
        )


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    """Caches are checked by whoever is given them: before the first stage, before each, by the trainer."""
    logger.warning("%s", message)
