"""KDTrainer: transformers.Trainer, fed from a cache.

What is ours: which sequences a step sees (``stream``), the loss (``head``), and its one reduction. The loss of an optimiser
step is the sum over the valid positions of the whole effective batch (all ranks, all accumulation steps) divided by their
number, and both are counted here: the Trainer's own count of items differs between releases.

The loss is computed inside the student's ``forward`` (which is extended, not replaced: without a ``kd_batch`` it is the
model's own), so that DDP and FSDP see one module call, and only chunks of logits ever exist.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from kdcache.cache.reader import CacheReader
from kdcache.calibration import calibration_error
from kdcache.progress import Progress
from kdcache.train.forward import Decoders, extend_forward, run_objective
from kdcache.train.mix import Group, Mix, count_targets, describe_group, group_caches
from kdcache.train.objective import NUM_SUMS, PARTS, Objective
from kdcache.train.recipe import Recipe, WeightedReaders, weighted
from kdcache.train.schedule import Schedule
from kdcache.train.stream import CacheDataset, KDBatchSampler, KDLoader, TargetDecoder, collate, epoch_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

WeightedCaches = CacheReader | Sequence[tuple[CacheReader, float]]


class KDTrainer(Trainer):
    """Trains a student from a cache.

    Args:
        model: The student; also a ``peft.PeftModel``, of which the adapters are trained.
        args: Any TrainingArguments; ``remove_unused_columns`` and ``include_num_input_tokens_seen`` are switched off.
        cache: What to train from; or several teachers' caches over the same sequences, each with a weight: the loss is the
            weighted sum of the losses to each (weights are divided by their sum).
        eval_cache: A cache of held-out text (or several, as above), evaluated every ``eval_steps``.
        alpha: Weight of the teacher: ``(1 - alpha) * CE + alpha * T^2 * D_T``. 0 trains on labels alone. A number, or a schedule
            (:mod:`kdcache.train.schedule`).
        temperature: T, one that the caches declare. A schedule moves through those that they declare, the nearest at a time.
        loss: Name of the divergence, see ``LOSSES``; or ``contrastive``, see ``student_cache``.
        loss_args: Its arguments, numbers or schedules.
        mix: Shares of tokens by kind of text (``real``, ``teacher``, ``student``) or path: then the caches are of several texts, not of
            several teachers, and their weights are not looked at.
        student_cache: For the loss ``contrastive`` (DistiLLM-2, 2503.07067): a cache of text that the student wrote, or several.
            There the loss is ``balance * skew_reverse_kl``, and on the teacher's text, in ``cache``, ``(2 - balance) * skew_kl``. For
            ``minillm`` (2306.08543) likewise: there ``alpha`` times the policy gradient with its single-step term, and on the real
            text, in ``cache``, ``1 - alpha`` times the cross-entropy.
        rollout_cache: What ``kdcache generate`` made with the student as the model, over the same sequences, or several: the
            probability with which it wrote them. ``minillm`` needs it; otherwise it tells the ``staleness``.
        chunk_positions: Positions whose logits may exist at a time.
        processing_class: The tokenizer, saved with checkpoints.
        **kwargs: Passed to ``transformers.Trainer``.

    Attributes:
        num_tokens_seen: Tokens of the sequences of this run's batches, over all ranks: prompts too, neither padding nor sequences that
            only fill up a step. ``state.num_input_tokens_seen`` has them since the first step, those before a resume too.

    Raises:
        ConfigError: An unknown loss, one that the caches' targets cannot give, or a temperature that a cache does not declare
            (with those that it does).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        cache: WeightedCaches,
        *,
        eval_cache: WeightedCaches | None = None,
        alpha: float | str | Schedule = 0.7,
        temperature: float | str | Schedule = 1.0,
        loss: str = "forward_kl",
        loss_args: Mapping[str, float | str] | None = None,
        mix: Mapping[str, float] | None = None,
        student_cache: CacheReader | Sequence[CacheReader] = (),
        rollout_cache: CacheReader | Sequence[CacheReader] = (),
        chunk_positions: int | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        self.recipe = Recipe.of(alpha, temperature, loss, loss_args)
        self.caches = weighted(cache)
        self.eval_caches = [] if eval_cache is None else weighted(eval_cache)
        own, rollouts = _readers(student_cache), _readers(rollout_cache)
        self.recipe.check(self.caches, self.eval_caches, own, rollouts, mixed=bool(mix))
        args.remove_unused_columns = False  # the columns are tensors that the model's own forward does not know
        # Counted here: transformers would count padding. Before 5.0 it asks for a truth value, and "no" is true.
        args.include_num_input_tokens_seen = "no" if isinstance(args.include_num_input_tokens_seen, str) else False
        args._n_gpu = min(
            args.n_gpu, 1
        )  # several GPUs are for torchrun: DataParallel would cut targets and tokens apart
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=self._texts(mix, own, rollouts),
            eval_dataset=CacheDataset(*_first_and_rest(self.eval_caches)) if self.eval_caches else None,
            processing_class=processing_class,
            **kwargs,
        )
        self.mix = make_mix(mix, self.train_dataset.texts, self._order_seed) if mix else None
        self.model_accepts_loss_kwargs = True  # transformers < 5: "the loss is divided by the whole batch already"
        self.loss_is_scaled_for_ga = True
        self._decoders: dict[tuple[bool, float], Decoders] = {}
        extend_forward(model, self.caches[0][0].vocab_size, chunk_positions, compiled=args.torch_compile)
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
        self._num_targets = 0
        self.num_tokens_seen = 0

    def _texts(
        self, mix: Mapping[str, float] | None, own: tuple[CacheReader, ...], rollouts: tuple[CacheReader, ...]
    ) -> CacheDataset:
        """What is trained on: several teachers of one text, or several texts."""
        first, rest = _first_and_rest(self.caches)
        others, more = ((), rest) if mix else (rest, ())
        return CacheDataset(first, others, more, own, rollouts, self.recipe.uses_teacher)

    @property
    def _order_seed(self) -> int:
        return int(self.args.data_seed if self.args.data_seed is not None else self.args.seed)

    @property
    def objective(self) -> Objective:
        """What counts at the step in hand."""
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return self.recipe.at(progress, [*self.caches, *self.eval_caches])

    def _decoders_at(self, temperature: float, *, training: bool) -> Decoders:
        key = (training, temperature)
        if key not in self._decoders:
            device = torch.device("cpu") if self.args.device.type == "cpu" else self.args.device
            caches = self.caches if training else self.eval_caches
            if training and self.mix is not None:
                caches = [(caches[0][0], 1.0)]  # all texts have targets of one kind
            self._decoders[key] = [(w, TargetDecoder.for_cache(reader, temperature, device)) for reader, w in caches]
        return self._decoders[key]

    # --- what a step sees ---

    def get_train_dataloader(self) -> KDLoader:
        """This rank's micro-batches."""
        return self._loader(self.train_dataset, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> KDLoader:
        """This rank's part of the held-out cache, in order."""
        assert self.eval_caches, "evaluation needs an eval_cache"
        return self._loader(self.eval_dataset, training=False)

    def _loader(self, dataset: CacheDataset, *, training: bool) -> KDLoader:
        args = self.args
        sampler = KDBatchSampler(
            len(dataset),
            args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
            accumulation=args.gradient_accumulation_steps if training else 1,
            fingerprint=dataset.fingerprint,
            seed=self._order_seed,
            rank=args.process_index,
            world_size=args.world_size,
            shuffle=training,
            mix=self.mix if training else None,
        )
        return KDLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """The micro-batches of an optimiser step, and the number of targets in them over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        sums = [sum(int(batch[name].sum()) for batch in batches) for name in ("target_mask", "num_tokens")]
        counts = torch.tensor(sums, device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        num_tokens = int(counts[1])
        self.num_tokens_seen += num_tokens
        self.state.num_input_tokens_seen += num_tokens
        return batches, counts[0]

    # --- the loss ---

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over this micro-batch / targets of the effective batch, times the ranks whose gradients DDP will average."""
        objective = self.objective
        # Where alpha is 0 only for now, the teacher is still measured.
        decoders = self._decoders_at(objective.temperature, training=True) if self.recipe.uses_teacher else []
        sums = run_objective(model, inputs, objective, decoders)
        count = int(inputs["target_mask"].sum())
        self._sums += sums.flat().double().cpu()
        self._num_targets += count
        items = count if num_items_in_batch is None else num_items_in_batch
        loss = sums.loss / max(int(items), 1) * self.args.world_size
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss since the last log, each a mean over positions."""
        if "loss" in logs:
            logs |= self._means(self._sums, self._num_targets, with_teacher=self.recipe.uses_teacher)[0]
            logs |= self.recipe.moving(self.objective)
            self._sums.zero_()
            self._num_targets = 0
        super().log(logs, start_time)

    def _means(
        self, sums: torch.Tensor, num_targets: int, *, with_teacher: bool
    ) -> tuple[dict[str, float], torch.Tensor]:
        """Parts as means over the positions of all ranks, under the names that are logged; and the calibration sums."""
        totals = torch.cat([sums, torch.tensor([float(num_targets)], dtype=torch.float64)])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals.float().to(self.args.device), reduction="sum").double().cpu()
        parts, calibration = totals[1 : 1 + len(PARTS)], totals[1 + len(PARTS) : -1].view(-1, 3)
        means = dict(zip(PARTS, (parts / totals[-1].clamp(min=1)).tolist(), strict=True))
        divergence, staleness, share = (means.pop(name) for name in ("divergence", "staleness", "rollout_share"))
        stale = {"staleness": staleness / share, "rollout_share": share} if share else {}
        if any(reader.spec.targets.frequencies for reader, _ in [*self.caches, *self.eval_caches]):
            means.pop("acceptance_rate")  # not linear in the teacher
        if not with_teacher:
            return {"cross_entropy": means["cross_entropy"]} | stale, calibration
        return {self.recipe.measured: divergence} | means | stale, calibration

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over every position of the held-out cache: loss, its parts, perplexity, calibration error (ECE, 15 bins)."""
        model = self.model
        was_training = model.training
        model.eval()
        sums, num_targets = torch.zeros(NUM_SUMS, dtype=torch.float64), 0
        now = self.objective
        alpha = now.alpha
        objective = dataclasses.replace(now, alpha=alpha or 1.0, weight=1.0, on_student_text=None)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                decoders = self._decoders_at(objective.temperature, training=False)
                sums += run_objective(model, inputs, objective, decoders).flat().double().cpu()
                num_targets += int(inputs["target_mask"].sum())
        model.train(was_training)
        means, calibration = self._means(sums, num_targets, with_teacher=True)
        distilled = alpha * now.temperature**2 * means[self.recipe.measured] if alpha else 0.0
        metrics = {
            "loss": (1 - alpha) * means["cross_entropy"] + distilled,
            "perplexity": math.exp(min(means["cross_entropy"], 700.0)),
            **means,
            "calibration_error": calibration_error(calibration),
        }
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(named))
        control = self.callback_handler.on_evaluate(self.args, self.state, self.__dict__["control"], named)
        self.control = control
        return named


def make_mix(shares: Mapping[str, float], texts: Sequence[CacheReader], seed: int) -> Mix:
    """The order of several texts, see :mod:`kdcache.train.mix`."""
    starts = np.cumsum([0, *(len(reader) for reader in texts)])
    groups = []
    for name, members in group_caches(shares, texts).items():
        chosen = [texts[number] for number in members]
        indices = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in members])
        counts = np.concatenate([count_targets(reader) for reader in chosen])
        fingerprint = "".join(reader.manifest.fingerprint for reader in chosen)
        permutation = partial(epoch_order, len(indices), fingerprint, seed)
        groups.append(Group(name, shares[name] / sum(shares.values()), indices, counts, permutation))
    mix = Mix(tuple(groups))
    first_epoch = mix.order(0)
    for group in mix.groups:
        logger.info("mix: %s", describe_group(group, first_epoch))
    return mix


def _readers(caches: CacheReader | Sequence[CacheReader]) -> tuple[CacheReader, ...]:
    return (caches,) if isinstance(caches, CacheReader) else tuple(caches)


def _first_and_rest(caches: WeightedReaders) -> tuple[CacheReader, tuple[CacheReader, ...]]:
    first, *rest = (reader for reader, _ in caches)
    return first, tuple(rest)


class ProgressLine(TrainerCallback):
    """Steps, loss and tokens a second, on stderr."""

    def __init__(self, trainer: KDTrainer) -> None:
        self.trainer, self.progress, self.loss = trainer, Progress("train", 1), ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar where training starts."""
        self.before = state.global_step
        self.progress = Progress("train", state.max_steps, state.global_step)
        if state.is_world_process_zero:
            self.progress.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step."""
        if state.is_world_process_zero:
            speed = self.trainer.num_tokens_seen / self.progress.seconds
            line = f"step {state.global_step}/{state.max_steps}{self.loss}, {speed:,.0f} tokens/s"
            self.progress.update(state.global_step - self.before, line)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Remember the loss."""
        if logs and "loss" in logs:
            self.loss = f", loss {logs['loss']:.3f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        self.progress.__exit__(None, None, None)


class Checkpoints(TrainerCallback):
    """Checkpoints as they are asked for now: not as the run that is taken up asked, and not one more at the end, where the student is saved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Transformers takes the intervals from the checkpoint."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Transformers saves at the last step, whatever it is."""
        if (
            state.global_step >= state.max_steps
            and state.global_step % state.save_steps
            and not args.load_best_model_at_end
        ):
            control.should_save = False


class MetricsFile(TrainerCallback):
    """``metrics.jsonl`` beside the student: a line a log, whatever other loggers there are.

    A resumed run drops the lines of steps that it will do again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that training goes on from."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step and state.global_step > 0]
        self.path.write_text("".join(line + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Append a line."""
        if state.is_world_process_zero and logs:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the last line of a killed run
        return 1 << 62
