"""Students that learn low-rank adapters and keep their own weights (LoRA, 2106.09685).

The adapters are peft's; here is how they are asked for. Such a student is saved as peft saves it, the adapters alone, and
``kdcache.models.load_model`` puts them back on their base model.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdcache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, fields: Mapping[str, Any], base: str) -> Any:
    """The model inside a ``peft.PeftModel`` whose adapters alone are trained.

    Args:
        model: The student.
        fields: Of ``peft.LoraConfig``. Every linear layer but the output head is adapted unless ``target_modules`` says
            otherwise.
        base: The student's name, by which the adapters will find it.

    Raises:
        ConfigError: No peft here, a field that LoraConfig does not have, or one that does not fit this model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("--lora needs the peft package", hint="pip install 'kdcache[lora]'") from error
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"--lora {name}: peft.LoraConfig has no such field",
                hint=f"did you mean {close[0]}?" if close else "r, lora_alpha, target_modules, lora_dropout ...",
            )
    shown = ", ".join(f"{name}={value}" for name, value in fields.items())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers 5 in the words of transformers 4
            config = LoraConfig(**{"target_modules": "all-linear", **fields, "task_type": "CAUSAL_LM"})
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--lora {shown}: {str(error).splitlines()[0]}", hint="the fields are those of peft.LoraConfig"
        ) from error
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a ``PeftModel`` (its layers carry the adapters); any other model as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
