"""A student model to begin with: layers or width cut out of a teacher, or random weights in a given shape."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.commit import check_no_cache
from kdcache.errors import ConfigError, ModelError
from kdcache.heads import trunk_of
from kdcache.model_files import find_model
from kdcache.models import load_config, load_model, load_tokenizer, parse_dtype, quiet_progress
from kdcache.rows import load_rows
from kdcache.train.options import InitOptions
from kdcache.train.width import WIDTHS, cut_width, smaller, widths_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Attributes of modules that are other ones in a layer of another number, or after a forward pass, and mean nothing for what it computes.
CHANGING = ("layer_idx", "layer_id", "layer_index", "layer_number", "training", "max_seq_len_cached")


def init_student(options: InitOptions) -> dict[str, Any]:
    """Write a student folder.

    Returns:
        What it is: number of parameters, layers and widths kept or shape.

    Raises:
        ConfigError: Neither or both of a cut (``layers``, a width) and ``shape``; sizes that the teacher or the family cannot give.
    """
    asked = {name: size for name in WIDTHS if (size := getattr(options, name)) is not None}
    if bool(options.layers or asked) == (options.shape is not None):
        raise ConfigError(
            "one of --layers and --shape is needed, or a width such as --hidden-size in the place of --layers or beside it",
            hint="--layers 8 keeps 8 of the teacher's layers, --hidden-size 384 as many of its channels; --shape hidden_size=256 "
            "begins with random weights",
        )
    source = find_model(options.from_)
    if Path(options.output).resolve() == Path(source.folder_or_name).resolve():
        raise ConfigError(f"--output {options.output} is the teacher itself", hint="name another folder")
    check_no_cache(options.output)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    about: dict[str, Any]
    if options.shape is not None:
        model, about = _random_student(options), {"init": "random", "shape": options.shape}
    else:
        config = load_config(source, trust_remote_code=options.trust_remote_code)
        if asked:
            smaller(widths_of(config), asked)  # refused before anything is loaded
        dtype = parse_dtype(options.dtype, config)
        model = load_model(source, dtype=dtype, trust_remote_code=options.trust_remote_code)
        about = {"init": "layers" if options.layers else "width"}
        if options.layers:
            about["layers"] = _cut_layers(model, tokenizer, options)
        if asked:
            model = _cut_width(model, tokenizer, options, asked)
            about["widths"] = {name: getattr(model.config, name) for name in WIDTHS}
    with quiet_progress():
        model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    about |= {
        "teacher": options.from_,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seed": options.seed,
    }
    (Path(options.output) / "kdcache_init.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


# --- random -----------------------------------------------------------------------------------------------------------


def _random_student(options: InitOptions) -> PreTrainedModel:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import set_seed

    assert options.shape is not None
    source = find_model(options.from_)
    config = load_config(source, trust_remote_code=options.trust_remote_code)
    known = [name for name in config.to_dict() if not name.startswith("_")]
    for name in options.shape:
        if name not in known and not hasattr(config, name):
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"--shape {name}: a {config.model_type} config has no such field",
                hint=f"did you mean {close[0]}?" if close else "known are " + ", ".join(sorted(known)),
            )
    num_layers = config.num_hidden_layers
    try:
        for name, value in options.shape.items():
            if type(getattr(config, name, None)) is int and type(value) is not int:  # older transformers take anything
                raise ConfigError(f"--shape {name}={value}: a whole number was expected")
            setattr(config, name, value)
    except StrictDataclassError as error:
        raise ConfigError(f"--shape {name}={value}: {error.__cause__ or error!s}") from error
    if "head_dim" not in options.shape and getattr(config, "head_dim", None) and "hidden_size" in options.shape:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if config.num_hidden_layers < num_layers:
        _cut_lists(config, num_layers, range(config.num_hidden_layers), but=options.shape)
    set_seed(options.seed)
    model = _build(config, "--shape " + ", ".join(f"{name}={value}" for name, value in options.shape.items()))
    return model.to(parse_dtype(options.dtype, config))


def _build(config: Any, asked: str) -> PreTrainedModel:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    try:
        if hasattr(config, "validate"):
            config.validate()
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (StrictDataclassError, ValueError, RuntimeError, ZeroDivisionError, TypeError) as error:
        raise ConfigError(
            f"{asked}: there is no such {config.model_type} model: {error.__cause__ or error}",
            hint="sizes must fit each other: hidden_size is a multiple of num_attention_heads ...",
        ) from error
    return model


# --- cut out of the teacher -------------------------------------------------------------------------------------------


def _cut_width(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: InitOptions, asked: dict[str, int]
) -> PreTrainedModel:
    config, state = cut_width(
        model, _calibration_ids(model, tokenizer, options), smaller(widths_of(model.config), asked)
    )
    narrow = _build(config, " ".join(f"--{name.replace('_', '-')} {size}" for name, size in asked.items()))
    narrow.to(model.dtype).load_state_dict(state)
    narrow.generation_config = model.generation_config
    return narrow.eval()


def _cut_layers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: InitOptions) -> list[int]:
    layers_name, layers = _find_layers(model)
    assert options.layers is not None
    if options.layers > len(layers):
        raise ConfigError(f"--layers {options.layers}: the teacher has {len(layers)}")
    distances = _angular_distances(model, tokenizer, options, len(layers) - options.layers)
    kept = keep_layers(distances, len(layers), options.layers)
    import torch

    chosen = torch.nn.ModuleList([layers[i] for i in kept])
    parent = model.get_submodule(layers_name.rpartition(".")[0])
    setattr(parent, layers_name.rpartition(".")[2], chosen)
    for index, layer in enumerate(chosen):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", index)  # noqa: B010 - typed as a submodule
    config = model.config.get_text_config()
    config.num_hidden_layers = len(kept)
    _cut_lists(config, len(layers), kept)
    _check_layers(model, layers_name, kept)
    return kept


def _cut_lists(config: Any, num_layers: int, kept: Sequence[int], but: Collection[str] = ()) -> None:
    """Leave of every list with an item a layer those of the kept ones.

    ``layer_types``, ``no_rope_layers``, ``mlp_layer_types``, ``layer_rope_theta`` ...: families name them as they like.
    """
    from transformers import PretrainedConfig

    shared = {*PretrainedConfig().to_dict(), *but}  # names of classes, labels: nothing of layers
    for name in config.to_dict():
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and len(value) == num_layers and name not in shared and "token" not in name:
            setattr(config, name, [value[i] for i in kept])


def _check_layers(model: PreTrainedModel, layers_name: str, kept: Sequence[int]) -> None:
    """Refuse a config from which other layers would come than those that were kept.

    What a layer does can follow from its number: dense or sparse, with rotary embeddings or without, its window. So a model is built from
    the config, without weights, as whoever loads the student will build it, and its layers are held against the kept ones.

    Raises:
        ModelError: They differ.
    """
    import torch

    if getattr(model.config, "quantization_config", None):
        return  # packed weights have other shapes
    hint = "a config of this family says it by the numbers of layers; --shape begins with random weights"
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            rebuilt = type(model)(config)
    except Exception as error:
        first = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{type(model).__name__} with {len(kept)} of its layers: {first}", hint=hint) from error
    pairs = zip(kept, model.get_submodule(layers_name), rebuilt.get_submodule(layers_name), strict=True)
    for index, (number, ours, theirs) in enumerate(pairs):
        expected, found = _plain_attributes(ours), _plain_attributes(theirs)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ModelError(
                    f"layer {index} of the student would not be layer {number} of the teacher: {name} {found.get(name, 'missing')} in the place "
                    f"of {expected.get(name, 'nothing')}",
                    hint=hint,
                )


def _plain_attributes(layer: torch.nn.Module) -> dict[str, Any]:
    """Numbers, flags and names that its modules hold, and shapes of its parameters; but what counts layers, or changes as it runs."""
    found: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and not (name.startswith("_") or name in CHANGING):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def keep_layers(distances: Sequence[float], num_layers: int, num_kept: int) -> list[int]:
    """Layers that stay when the block that changes its input least is taken out; the last layer always stays.

    Gromov et al. 2403.17887, section 4: remove the n layers from l on that minimise the angular distance between the inputs
    of layer l and of layer l + n.

    Args:
        distances: For each possible start l of the block, the distance between the inputs of layers l and l + n.
        num_layers: Layers of the teacher.
        num_kept: Layers of the student.
    """
    num_removed = num_layers - num_kept
    if num_removed == 0:
        return list(range(num_layers))
    start = min(range(len(distances)), key=lambda i: distances[i])
    return [i for i in range(num_layers) if not start <= i < start + num_removed]


def _angular_distances(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: InitOptions, num_removed: int
) -> list[float]:
    """``arccos(cos(x_l, x_{l+n})) / pi`` of the residual stream, mean over tokens, for each start l that spares the last layer."""
    import torch

    input_ids = _calibration_ids(model, tokenizer, options)
    with torch.inference_mode():
        states = trunk_of(model)(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    num_layers = len(states) - 1
    distances = []
    for start in range(num_layers - num_removed):
        before, after = states[start].double().flatten(0, 1), states[start + num_removed].double().flatten(0, 1)
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=1).clamp(-1, 1)
        distances.append(float((cosine.arccos() / torch.pi).mean()))
    return distances


def _calibration_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: InitOptions) -> torch.Tensor:
    """``[B, L]`` token ids of the calibration text, no longer than the teacher's context."""
    import torch

    rows = load_rows(options.calibration, "train")
    if "text" not in rows.column_names:
        raise ConfigError(f"--calibration {options.calibration}: a text column was expected, found {rows.column_names}")
    length, context = 512, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512
    ids: list[int] = []
    for row in rows:
        ids.extend(tokenizer(row["text"])["input_ids"])
        if len(ids) >= options.calibration_tokens:
            break
    if not ids:
        raise ConfigError(
            f"--calibration {options.calibration}: some text was expected, found none in {len(rows)} rows"
        )
    length = min(length, len(ids), context)
    count = max(1, min(len(ids), options.calibration_tokens) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def _find_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    import torch

    number = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number:
            return name, module
    raise ModelError(f"{type(model).__name__}: no list of {number} layers was found to choose from")
