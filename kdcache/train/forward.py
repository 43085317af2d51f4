"""The student's forward pass, extended so that it gives loss sums instead of logits.

Extended, not replaced: without a ``kd_batch`` it is the model's own. The loss is computed inside the model's call, so that DDP,
FSDP and torch.compile see one module call, and only chunks of logits ever exist.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from kdcache.heads import OutputHead, gather_head, head_of, hidden_states, split_is_exact
from kdcache.train.head import kd_loss
from kdcache.train.lora import without_adapters
from kdcache.train.objective import LossSums, Objective, Rollouts, Targets
from kdcache.train.stream import TargetDecoder, decode_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Decoders = list[tuple[float, TargetDecoder]]


def run_objective(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], objective: Objective, decoders: Decoders
) -> LossSums:
    """Forward pass and loss of a micro-batch on the model's device; ``model`` may be wrapped (DDP, FSDP, torch.compile).

    Raises:
        ConfigError: Rows count, the objective needs targets of them, and there are none.
    """
    targets = decode_all(decoders, batch)
    if targets is None and objective.uses_teacher and not batch["target_mask"].any():
        objective = Objective(0.0)  # a micro-batch that only fills up the last step of an epoch
    return LossSums.from_flat(*model(kd_batch={"batch": batch, "targets": targets, "objective": objective}))


def extend_forward(
    model: PreTrainedModel, vocab_size: int, chunk_positions: int | None = None, *, compiled: bool = False
) -> None:
    """Teach a model's ``forward`` the argument ``kd_batch``.

    Args:
        model: The student, or a ``peft.PeftModel`` around it.
        vocab_size: V of the cache; the student's further rows are padding.
        chunk_positions: Positions whose logits may exist at a time.
        compiled: The model will be compiled: trunk only, the loss stays eager (its gradient is formed by hand already).
    """
    model = without_adapters(model)
    plain_forward = model.forward
    exact = split_is_exact(model)
    if not exact:
        logger.warning(
            "%s: its output head is not understood; using the model's own logits, whole", type(model).__name__
        )

    def loss_of(
        states: torch.Tensor, head: OutputHead | None, batch: dict[str, torch.Tensor], targets: Targets | None, objective: Objective
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        mask = batch["target_mask"]
        states, labels = states[mask], batch["input_ids"].roll(-1, dims=1)[mask]
        written = None
        if "rollout_logprobs" in batch:
            written = Rollouts(batch["rollout_logprobs"], batch["advantages"])
        if objective.on_student_text is None:
            sums = kd_loss(
                states, targets, labels, objective, head=head, chunk_positions=chunk_positions, rollouts=written
            )
        else:
            own = batch["from_student"][:, None].expand_as(mask)[mask]
            sides = ((~own, objective), (own, objective.on_student_text))
            first, second = (
                kd_loss(
                    states[rows], None if targets is None else targets[rows], labels[rows], side,
                    head=head, chunk_positions=chunk_positions, rollouts=None if written is None else written[rows],
                )
                for rows, side in sides
            )  # fmt: skip
            sums = first + second
        return sums.loss, sums.flat()[1:]

    if compiled:
        loss_of = torch.compiler.disable(loss_of)  # type: ignore[no-untyped-call]

    def forward(self: PreTrainedModel, *args: Any, kd_batch: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if kd_batch is None:
            return plain_forward(*args, **kwargs)
        batch = kd_batch["batch"]
        if exact:
            states = hidden_states(self, batch["input_ids"], batch["position_ids"])
            head = gather_head(head_of(self)).first(vocab_size)
            return loss_of(states, head, batch, kd_batch["targets"], kd_batch["objective"])
        arguments = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        states = plain_forward(**arguments).logits[:, :, :vocab_size]
        return loss_of(states, None, batch, kd_batch["targets"], kd_batch["objective"])

    model.forward = MethodType(forward, model)
