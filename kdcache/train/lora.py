"""Students that learn low-rank adapters and keep their own weights (LoRA, 2106.09685).

The adapters are peft's; here is how they are asked for. Such a student is saved as peft saves it, the adapters alone, and
``kdcache.models.load_model`` puts them back on their base model. A student that is an adapter already (a second stage, the next
round) is trained on, as the same adapter of the same base model.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdcache.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


def add_lora(model: PreTrainedModel, fields: Mapping[str, Any], student: str, adapter: str | None = None) -> Any:
    """The model inside a ``peft.PeftModel`` whose adapters alone are trained.

    Args:
        model: The student; where it is an adapter, its base model.
        fields: Of ``peft.LoraConfig``. Every linear layer but the output head is adapted unless ``target_modules`` says
            otherwise.
        student: Its name, by which the adapters will find it.
        adapter: Folder of an adapter of the model, which is trained on; it finds the same base model as before.

    Raises:
        ConfigError: No peft here, a field that LoraConfig does not have, one that does not fit this model, or other fields than the
            adapter has.
    """
    check_lora(fields)
    from peft import LoraConfig, get_peft_model

    shown = ", ".join(f"{name}={value}" for name, value in fields.items())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers 5 in the words of transformers 4
            config = LoraConfig(**{"target_modules": ALL_LINEAR, **fields, "task_type": "CAUSAL_LM"})
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--lora {shown}: {str(error).splitlines()[0]}", hint="the fields are those of peft.LoraConfig"
        ) from error
    adapted.peft_config["default"].base_model_name_or_path = student
    if adapter is not None:
        _load_adapter(adapted, adapter)
    return adapted


def check_lora(fields: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
    """Refuse fields that cannot be, before a model is there.

    Args:
        fields: Of ``peft.LoraConfig``.
        before: Those of the stage before, whose adapter is trained on, if it leaves one.

    Raises:
        ConfigError: No peft here, a field that LoraConfig does not have, or other fields than the stage before.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("--lora needs the peft package", hint="pip install 'kdcache[lora]'") from error
    known = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"--lora {name}: peft.LoraConfig has no such field",
                hint=f"did you mean {close[0]}?" if close else "r, lora_alpha, target_modules, lora_dropout ...",
            )
    if not before:
        return
    defaults = LoraConfig().to_dict() | {"target_modules": ALL_LINEAR}
    ours, theirs = (defaults | dict(one) for one in (fields, before))
    if differing := [name for name in known if _as_set(ours.get(name)) != _as_set(theirs.get(name))]:
        lines = "".join(f"\n  {n}: that has {theirs[n]!r}, this one {ours[n]!r}" for n in differing)
        raise ConfigError(
            f"--lora: the adapter of the stage before can only be trained on as it is:{lines}",
            hint="leave lora out of --then, and it stays as it is; lora={} merges adapter and model, and all weights are trained",
        )


def _as_set(value: Any) -> Any:
    """Names in whatever order."""
    return frozenset(map(str, value)) if isinstance(value, list | tuple | set) else value


def _load_adapter(adapted: Any, folder: str) -> None:
    """Begin with the weights of an adapter that has the same fields: an adapter cannot stand on another one."""
    from peft import PeftConfig

    before = PeftConfig.from_pretrained(folder)
    asked = adapted.peft_config["default"]
    asked.base_model_name_or_path = before.base_model_name_or_path
    ours, theirs = (_fields_of(config) for config in (asked, before))
    differing = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if differing:
        lines = "".join(f"\n  {n}: the adapter has {theirs.get(n)!r}, --lora gives {ours.get(n)!r}" for n in differing)
        raise ConfigError(
            f"--student {folder} is an adapter, which can only be trained on as it is:{lines}",
            hint="--lora with the adapter's own fields; without --lora adapter and model are merged, and all weights are trained",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted.load_adapter(folder, "default", is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:  # no weights, or of other sizes
        raise ModelError(f"adapter {folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _fields_of(config: Any) -> dict[str, Any]:
    """What makes an adapter, as a file has it."""
    beside = ("inference_mode", "task_type", "peft_version", "auto_mapping", "revision")
    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=sorted))  # sets
    return {name: value for name, value in fields.items() if name not in beside}


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a ``PeftModel`` (its layers carry the adapters); any other model as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
