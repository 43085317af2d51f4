"""What a model takes before anybody has it: parameters, counted; memory and arithmetic, computed from its config.

Parameters come from the model itself, built without weights, so they are exact for any family. Memory of weights, cache of keys and
values, and optimizer follows from them exactly; that of activations is an estimate for a decoder with a gated MLP and attention that
does not write its scores (sdpa, flash), within about a third.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import ConfigError, ModelError
from kdcache.model_files import ModelSource, find_model
from kdcache.models import load_config, meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Positions whose logits a dump holds on a GPU, and elements of its two float32 buffers at most.
LOGIT_POSITIONS, BUFFER_ELEMENTS = 4096, 1 << 28


@dataclass(frozen=True, slots=True)
class Shape:
    """A model in numbers.

    Attributes:
        num_parameters: Counted on the model built without weights; tied ones once.
        num_looked_up: Of them, the input embedding where it is not also the output head: no product runs over it.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: Of the MLP.
        num_layers: Of the trunk.
        num_heads: Of attention.
        num_kv_heads: Of keys and values.
        head_dim: Of each.
        context: Longest sequence, or None.
        dtype: What the config says.
    """

    num_parameters: int
    num_looked_up: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int | None
    dtype: str

    def weight_bytes(self, dtype: str) -> int:
        """Of the parameters."""
        return self.num_parameters * BYTES[dtype]

    def kv_bytes(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES[dtype]

    def forward_flops(self, seq_len: int) -> float:
        """Of one token, on average over a sequence: ``2 N`` for the products, ``2 T`` a layer and attention channel for causal attention."""
        products = 2 * (self.num_parameters - self.num_looked_up)
        return products + 2.0 * self.num_layers * seq_len * self.num_heads * self.head_dim

    def reading_bytes(self, num_tokens: int, dtype: str) -> int:
        """Activations of a forward pass over so many tokens: one layer's at a time, the states, a chunk of logits."""
        states = 3 * self.hidden_size + 2 * self.num_heads * self.head_dim + 3 * self.intermediate_size
        logits = min(num_tokens, LOGIT_POSITIONS) * self.vocab_size
        return num_tokens * states * BYTES[dtype] + logits * BYTES[dtype] + 2 * 4 * min(logits, BUFFER_ELEMENTS)

    def training_bytes(self, num_tokens: int, *, checkpointing: bool) -> int:
        """Activations of a training step over so many tokens in 16 bits, and a chunk of logits with its gradient."""
        layer = 8 * self.hidden_size + 4 * self.num_heads * self.head_dim + 4 * self.intermediate_size
        kept = self.num_layers * self.hidden_size + layer if checkpointing else self.num_layers * layer
        return 2 * num_tokens * kept + 2 * 4 * min(num_tokens * self.vocab_size, BUFFER_ELEMENTS)

    def step_bytes(self, num_tokens: int, num_gpus: int) -> tuple[int, int]:
        """What a GPU holds of a student that learns from so many tokens a step, with checkpointing, split over GPUs.

        Returns:
            Of weights, gradients and AdamW in float32; of activations and logits.
        """
        return 16 * self.num_parameters // num_gpus, self.training_bytes(num_tokens, checkpointing=True)


def read_shape(name: str) -> Shape:
    """Of a model folder, a ``config.json``, or any other model whose config can be had.

    Raises:
        ConfigError: Not a config, or one of a model that transformers does not know.
        ModelError: There is no such folder or model.
    """
    source = ModelSource(name, name, None) if name.endswith(".json") else find_model(name)
    config = _read_json(name) if name.endswith(".json") else load_config(source)
    return shape_of(meta_model(source, config))


def shape_of(model: PreTrainedModel) -> Shape:
    """Of a model that is built, with weights or without."""
    text = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = outputs is None or outputs.weight is inputs.weight
    heads = int(text.num_attention_heads)
    return Shape(
        num_parameters=parameters,
        num_looked_up=0 if is_tied else inputs.weight.numel(),
        vocab_size=int(text.vocab_size),
        hidden_size=int(text.hidden_size),
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        num_layers=int(text.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        context=getattr(text, "max_position_embeddings", None),
        dtype=str(getattr(text, "dtype", None) or getattr(model.config, "dtype", None) or "float32").removeprefix(
            "torch."
        ),
    )


def _read_json(path: str) -> Any:
    from transformers import AutoConfig

    hint = "the config.json of a transformers model folder"
    try:
        fields = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        raise ModelError(f"model config {path}: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise ConfigError(f"model config {path}: not JSON ({error})", hint=hint) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ConfigError(f"model config {path}: a mapping with a model_type was expected", hint=hint)
    kind = fields.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model config {path}: {str(error).strip().splitlines()[0]}", hint=hint) from error
