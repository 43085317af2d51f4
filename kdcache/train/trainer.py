"""KDTrainer: transformers.Trainer, fed from a cache.

What is ours: which sequences a step sees (``stream``), the loss (``head``), and its one reduction. The loss of an optimiser
step is the sum over the valid positions of the whole effective batch (all ranks, all accumulation steps) divided by their
number, and both are counted here: the Trainer's own count of items differs between releases.

The loss is computed inside the student's ``forward`` (which is extended, not replaced: without a ``kd_batch`` it is the
model's own), so that DDP and FSDP see one module call, and only chunks of logits ever exist.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from kdcache.cache.reader import CacheReader
from kdcache.errors import ConfigError
from kdcache.heads import OutputHead, head_of, hidden_states, split_is_exact
from kdcache.progress import Progress
from kdcache.train.head import LossSums, Objective, kd_loss, kd_loss_from_logits
from kdcache.train.losses import LOSSES
from kdcache.train.stream import CacheDataset, KDBatchSampler, KDLoader, TargetDecoder, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PARTS = ("loss", "cross_entropy", "divergence", "num_agree")


class KDTrainer(Trainer):
    """Trains a student from a cache.

    Args:
        model: The student.
        args: Any TrainingArguments; ``remove_unused_columns`` is switched off.
        cache: What to train from.
        eval_cache: A cache of held-out text, evaluated every ``eval_steps``.
        alpha: Weight of the teacher: ``(1 - alpha) * CE + alpha * T^2 * D_T``. 0 trains on labels alone.
        temperature: T, one that the caches declare.
        loss: Name of the divergence, see ``LOSSES``.
        chunk_positions: Positions whose logits may exist at a time.
        processing_class: The tokenizer, saved with checkpoints.
        **kwargs: Passed to ``transformers.Trainer``.

    Raises:
        ConfigError: An unknown loss, or a temperature that a cache does not declare (with those that it does).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        cache: CacheReader,
        *,
        eval_cache: CacheReader | None = None,
        alpha: float = 0.7,
        temperature: float = 1.0,
        loss: str = "forward_kl",
        chunk_positions: int | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if loss not in LOSSES:
            raise ConfigError(f"loss {loss!r}: expected one of {', '.join(LOSSES)}")
        self.objective = Objective(alpha, temperature, LOSSES[loss])
        self.cache, self.eval_cache = cache, eval_cache
        args.remove_unused_columns = False  # the columns are tensors that the model's own forward does not know
        args._n_gpu = min(
            args.n_gpu, 1
        )  # several GPUs are for torchrun: DataParallel would cut targets and tokens apart
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=CacheDataset(cache, with_targets=alpha > 0),
            eval_dataset=None if eval_cache is None else CacheDataset(eval_cache),
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # transformers < 5: "the loss is divided by the whole batch already"
        self.loss_is_scaled_for_ga = True
        device = torch.device("cpu") if args.device.type == "cpu" else args.device
        self._decoder = TargetDecoder.for_cache(cache, temperature, device) if alpha > 0 else None
        self._eval_decoder = (
            TargetDecoder.for_cache(eval_cache, temperature, device) if eval_cache is not None else None
        )
        extend_forward(model, cache.vocab_size, chunk_positions)
        self._sums = torch.zeros(len(PARTS), dtype=torch.float64)
        self._num_targets = 0
        self.num_tokens_seen = 0

    # --- what a step sees ---

    def get_train_dataloader(self) -> KDLoader:
        """This rank's micro-batches."""
        return self._loader(CacheDataset(self.cache, with_targets=self.objective.alpha > 0), training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> KDLoader:
        """This rank's part of the held-out cache, in order."""
        assert self.eval_cache is not None, "evaluation needs an eval_cache"
        return self._loader(CacheDataset(self.eval_cache), training=False)

    def _loader(self, dataset: CacheDataset, *, training: bool) -> KDLoader:
        args = self.args
        sampler = KDBatchSampler(
            len(dataset),
            args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
            accumulation=args.gradient_accumulation_steps if training else 1,
            fingerprint=dataset.reader.manifest.fingerprint,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            rank=args.process_index,
            world_size=args.world_size,
            shuffle=training,
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
        count = torch.tensor(sum(int(batch["target_mask"].sum()) for batch in batches), device=device)
        self.num_tokens_seen += sum(batch["input_ids"].numel() for batch in batches)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        return batches, count

    # --- the loss ---

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over this micro-batch / targets of the effective batch, times the ranks whose gradients DDP will average."""
        sums = run_objective(model, inputs, self.objective, self._decoder)
        count = int(inputs["target_mask"].sum())
        self._sums += (
            torch.stack([sums.loss.detach(), sums.cross_entropy, sums.divergence, sums.num_agree]).double().cpu()
        )
        self._num_targets += count
        items = count if num_items_in_batch is None else num_items_in_batch
        loss = sums.loss / max(int(items), 1) * self.args.world_size
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss since the last log, each a mean over positions."""
        if "loss" in logs:
            means = self._reduce(self._sums, self._num_targets)
            logs |= {"cross_entropy": means["cross_entropy"]}
            if self.objective.alpha > 0:
                logs |= {self._divergence_name: means["divergence"], "top1_agreement": means["num_agree"]}
            self._sums.zero_()
            self._num_targets = 0
        super().log(logs, start_time)

    @property
    def _divergence_name(self) -> str:
        return next(name for name, function in LOSSES.items() if function is self.objective.divergence)

    def _reduce(self, sums: torch.Tensor, num_targets: int) -> dict[str, float]:
        totals = torch.cat([sums, torch.tensor([float(num_targets)], dtype=torch.float64)])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals.float().to(self.args.device), reduction="sum").double().cpu()
        return {name: float(value / max(totals[-1], 1.0)) for name, value in zip(PARTS, totals, strict=False)}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over every position of the held-out cache: loss, cross-entropy, perplexity, divergence, agreement."""
        model = self.model
        was_training = model.training
        model.eval()
        sums, num_targets = torch.zeros(len(PARTS), dtype=torch.float64), 0
        objective = Objective(self.objective.alpha or 1.0, self.objective.temperature, self.objective.divergence)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                part = run_objective(model, inputs, objective, self._eval_decoder)
                sums += torch.stack([part.loss, part.cross_entropy, part.divergence, part.num_agree]).double().cpu()
                num_targets += int(inputs["target_mask"].sum())
        model.train(was_training)
        means = self._reduce(sums, num_targets)
        alpha = self.objective.alpha
        divergence = means["divergence"]
        metrics = {
            "loss": (1 - alpha) * means["cross_entropy"] + alpha * self.objective.temperature**2 * divergence,
            "cross_entropy": means["cross_entropy"],
            "perplexity": math.exp(min(means["cross_entropy"], 700.0)),
            self._divergence_name: divergence,
            "top1_agreement": means["num_agree"],
        }
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(named))
        control = self.callback_handler.on_evaluate(self.args, self.state, self.__dict__["control"], named)
        self.control = control
        return named


def run_objective(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], objective: Objective, decoder: TargetDecoder | None
) -> LossSums:
    """Forward pass and loss of a micro-batch on the model's device; ``model`` may be wrapped (DDP, FSDP)."""
    targets = decoder.decode(batch) if decoder is not None else None
    if targets is None and objective.alpha > 0:  # a micro-batch that only fills up the last step of an epoch
        objective = Objective(0.0)
    return LossSums(*model(kd_batch={"batch": batch, "targets": targets, "objective": objective}))


def extend_forward(model: PreTrainedModel, vocab_size: int, chunk_positions: int | None) -> None:
    """Teach a model's ``forward`` the argument ``kd_batch``, which makes it return loss sums instead of logits."""
    plain_forward = model.forward
    exact = split_is_exact(model)
    if not exact:
        logger.warning(
            "%s: its output head is not understood; using the model's own logits, whole", type(model).__name__
        )

    def forward(self: PreTrainedModel, *args: Any, kd_batch: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if kd_batch is None:
            return plain_forward(*args, **kwargs)
        batch, targets, objective = kd_batch["batch"], kd_batch["targets"], kd_batch["objective"]
        mask = batch["target_mask"]
        labels_N = batch["input_ids"].roll(-1, dims=1)[mask]
        if exact:
            hidden_BTD = hidden_states(self, batch["input_ids"], batch["position_ids"])
            head: OutputHead = head_of(self).first(vocab_size)
            sums = kd_loss(hidden_BTD[mask], head, labels_N, targets, objective, chunk_positions=chunk_positions)
        else:
            arguments = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            logits_NV = plain_forward(**arguments).logits[mask][:, :vocab_size]
            sums = kd_loss_from_logits(logits_NV, labels_N, targets, objective)
        return sums.loss, sums.cross_entropy, sums.divergence, sums.num_agree

    model.forward = MethodType(forward, model)


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
            speed = self.trainer.num_tokens_seen * args.world_size / self.progress.seconds
            line = f"step {state.global_step}/{state.max_steps}{self.loss}, {speed:,.0f} tokens/s"
            self.progress.update(state.global_step - self.before, line)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Remember the loss."""
        if logs and "loss" in logs:
            self.loss = f", loss {logs['loss']:.3f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        self.progress.__exit__(None, None, None)


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
