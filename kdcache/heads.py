"""A causal language model in two parts: the trunk gives hidden states, the output head turns them into logits.

Both phases need the parts, so that logits are made a chunk of positions at a time and ``[batch, positions, vocabulary]``
never exists. A head is a matrix and whatever its family does around it (bias, scale, soft cap); :func:`split_is_exact`
compares the two parts with the model's own logits, and a family that does not match is said to be not understood.

Documents packed into one sequence are kept apart by position ids that restart, which transformers turns into a block
diagonal mask. :func:`check_packing` runs that once and compares, because not every family does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.errors import CacheCorruptError, ModelError, TeacherOutputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """Hidden states to logits: ``softcap(scale * (hidden @ weight.T + bias))``, ``softcap(z) = cap * tanh(z / cap)``.

    Attributes:
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        scale: Cohere and Granite scale their logits; 1 elsewhere.
        softcap: Gemma's cap, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[N, D]`` to ``[N, V]`` float32. The product runs in the weight's dtype, as in the model itself."""
        return self.logits_as_computed(hidden).float()

    def logits_as_computed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same values, left in the weight's dtype where nothing but the product makes them."""
        import torch

        logits_NV = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1.0 or self.softcap is not None:
            logits_NV = logits_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def first(self, vocab_size: int) -> OutputHead:
        """The head over the first ``vocab_size`` tokens: padded rows of the vocabulary left out. Views, no copies."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return OutputHead(self.weight[:vocab_size], bias, self.scale, self.softcap)

    def to(self, device: str | torch.device) -> OutputHead:
        """The head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return OutputHead(self.weight.to(device), bias, self.scale, self.softcap)

    def to_bytes(self) -> bytes:
        """A safetensors file, the same bytes for the same head."""
        import safetensors.torch
        import torch

        tensors = {"weight": self.weight.detach().cpu().contiguous()}
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().cpu().contiguous()
        tensors["scale"] = torch.tensor([self.scale], dtype=torch.float64)
        if self.softcap is not None:
            tensors["softcap"] = torch.tensor([self.softcap], dtype=torch.float64)
        return bytes(safetensors.torch.save(tensors))

    @staticmethod
    def from_bytes(data: bytes, shape: tuple[int, int] | None = None) -> OutputHead:
        """Undo :meth:`to_bytes`. The format holds tensors and no code, so bytes from strangers can be read.

        Args:
            data: A safetensors file.
            shape: V and D that the weight must have.

        Raises:
            CacheCorruptError: Not such a file, or its tensors are not those of a head of this shape.
        """
        import safetensors
        import safetensors.torch

        try:
            tensors = safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise CacheCorruptError(f"output head: not a safetensors file ({error})") from error
        except KeyError as error:  # the format knows dtypes that its torch reader does not
            raise CacheCorruptError(
                f"output head: float32, bfloat16 or float16 tensors were expected, found {error}"
            ) from error
        weight = tensors.get("weight")
        rows = weight.shape[0] if weight is not None and weight.ndim == 2 else None
        expected = {"weight": None, "bias": (rows,), "scale": (1,), "softcap": (1,)}
        fits = all(
            shape is None or name not in tensors or tensors[name].shape == shape for name, shape in expected.items()
        )
        if (
            weight is None
            or rows is None
            or "scale" not in tensors
            or not fits
            or not tensors.keys() <= expected.keys()
            or not all(tensor.is_floating_point() for tensor in tensors.values())
        ):
            found = {name: (str(x.dtype).removeprefix("torch."), *x.shape) for name, x in sorted(tensors.items())}
            raise CacheCorruptError(
                f"output head: weight [V, D], scale, perhaps bias [V] and softcap, of floats, were expected, found {found}"
            )
        if shape is not None and weight.shape != shape:
            raise CacheCorruptError(f"output head: weight {shape} was expected, found {tuple(weight.shape)}")
        softcap = tensors.get("softcap")
        return OutputHead(
            weight, tensors.get("bias"), float(tensors["scale"]), None if softcap is None else float(softcap)
        )


def trunk_of(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its output head."""
    trunk: torch.nn.Module | None = getattr(model, model.base_model_prefix, None)
    if trunk is None or trunk is model:
        raise ModelError(f"{type(model).__name__} has no trunk apart from its output head")
    return trunk


def head_of(model: PreTrainedModel) -> OutputHead:
    """The model's output head, sharing its parameters.

    Raises:
        ModelError: It has no linear output head.
    """
    import torch

    linear = model.get_output_embeddings()
    if not isinstance(linear, torch.nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear output head")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))


def gather_head(head: OutputHead) -> OutputHead:
    """A head that FSDP2 has cut over ranks, whole; its gradient goes back to the pieces, averaged as FSDP averages.

    Heads that are whole already are given back as they are: FSDP gathers what belongs to the module whose forward runs.
    """
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return head
    from torch.distributed.tensor import DTensor, Partial

    def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if not isinstance(tensor, DTensor):
            return tensor
        gathered: torch.Tensor = tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
        return gathered

    weight = whole(head.weight)
    assert weight is not None, "a head has a weight"
    return OutputHead(weight, whole(head.bias), head.scale, head.softcap)


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Last hidden state ``[B, T, D]`` of right-padded rows whose position ids restart at every document.

    No attention mask is given: attention is causal, so padding on the right is never seen, and restarting positions tell
    the documents apart.
    """
    out = trunk_of(model)(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden_BTD: torch.Tensor = out.last_hidden_state
    return hidden_BTD


def split_is_exact(model: PreTrainedModel) -> bool:
    """Whether trunk and head give the model's own logits, tried on a few tokens."""
    import torch

    try:
        head = head_of(model)
        trunk_of(model)
    except ModelError:
        return False
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(3, 11, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(8, device=device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        own = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
        ours = head.logits(hidden_states(model, ids, positions)[0].to(head.weight.device)).to(own.device)
    model.train(was_training)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 3e-2
    return bool((own - ours).abs().max() <= tolerance * own.abs().max().clamp(min=1.0))


def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model that lets packed documents see each other.

    Raises:
        ModelError: The second of two packed documents comes out otherwise than alone.
        TeacherOutputError: The model gives NaN or Inf.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    # Two rows with borders of their own: some attention kernels tell documents apart only in batches of one.
    ids = torch.arange(5, 37, device=device).view(2, 16) % model.config.get_text_config().vocab_size
    borders = (9, 6)
    positions = torch.stack([torch.cat([torch.arange(b), torch.arange(16 - b)]) for b in borders]).to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = hidden_states(model, ids, positions).float()
        differences = []
        for row, border in enumerate(borders):
            alone = hidden_states(model, ids[row : row + 1, border:], positions[row : row + 1, border:])[0].float()
            differences.append((packed[row, border:] - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    model.train(was_training)
    difference = float(max(differences))
    if not packed.isfinite().all():
        raise TeacherOutputError(
            f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')} gives NaN or Inf for plain tokens",
            hint="try --dtype float32 or bfloat16; if that is what you had, look at its weights",
        )
    if not difference < (1e-3 if model.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{type(model).__name__} lets packed documents see each other (a packed document differs by {difference:.2g} "
            "from itself alone)",
            hint="use --attention sdpa, or --no-packing: one document a sequence",
        )
