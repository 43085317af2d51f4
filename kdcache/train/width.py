"""A narrower model out of a wide one: hidden channels, MLP neurons and attention heads that its activations use least are left out.

Importance is that of Minitron (2407.14679, section 2.2): forward passes over a little text, no gradients. A model is described by what
the axes of its parameters are (:data:`AXES`), found by name and checked by shape, so that one rule cuts every matrix. Families
that compute with their width in other ways (a scaled embedding, experts, fused projections) are refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.errors import ConfigError, ModelError
from kdcache.heads import trunk_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# The axes of a parameter, by the last two parts of its name. D hidden, F neurons, H query heads, G key/value heads; - stays.
AXES = {
    "embed_tokens.weight": "-D",
    "lm_head.weight": "-D",
    "norm.weight": "D",
    "input_layernorm.weight": "D",
    "post_attention_layernorm.weight": "D",
    "q_proj.weight": "HD",
    "q_proj.bias": "H",
    "k_proj.weight": "GD",
    "k_proj.bias": "G",
    "v_proj.weight": "GD",
    "v_proj.bias": "G",
    "o_proj.weight": "DH",
    "o_proj.bias": "D",
    "q_norm.weight": "-",
    "k_norm.weight": "-",
    "gate_proj.weight": "FD",
    "gate_proj.bias": "F",
    "up_proj.weight": "FD",
    "up_proj.bias": "F",
    "down_proj.weight": "DF",
    "down_proj.bias": "D",
}
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of a model: those of its config, under the same names."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """What the activations of a model say about its parts.

    Attributes:
        hidden: ``[D]``, summed over all norms.
        neurons: ``[F]`` of each layer.
        heads: ``[H]`` of each layer.
        shares: ``[D]`` of each norm by its name: the part of its input's energy that a channel has, mean over tokens.
    """

    hidden: torch.Tensor
    neurons: list[torch.Tensor]
    heads: list[torch.Tensor]
    shares: dict[str, torch.Tensor]


def widths_of(config: Any) -> Widths:
    """The sizes of a model.

    Raises:
        ConfigError: Its family is not one that can be cut in width.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"a {config.model_type} model cannot be cut in width; {', '.join(FAMILIES)} can",
            hint="--layers 8 keeps 8 layers of a model of any family; --shape begins with random weights",
        )
    return Widths(**{name: getattr(config, name) for name in WIDTHS})


def smaller(teacher: Widths, asked: dict[str, int]) -> Widths:
    """The student's sizes: as asked, else as the teacher's; query heads and key/value heads follow each other in whole groups.

    Raises:
        ConfigError: Larger than the teacher, or heads that do not come in equal groups.
    """
    for name, size in asked.items():
        if size > getattr(teacher, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} {size}: the teacher has {getattr(teacher, name)}",
                hint="a student cut out of a teacher is not larger; --shape begins with random weights of any size",
            )
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    heads = asked.get("num_attention_heads", asked.get("num_key_value_heads", teacher.num_key_value_heads) * group)
    groups = asked.get("num_key_value_heads", max(1, heads // group))
    if heads % groups or heads // groups > group or ("num_key_value_heads" not in asked and heads % group):
        raise ConfigError(
            f"--num-attention-heads {heads} and {groups} key/value heads: the teacher has {group} query heads for each of "
            f"its {teacher.num_key_value_heads} key/value heads, the student needs equal groups of at most {group}",
            hint=f"a multiple of {group} keeps whole groups; or give --num-key-value-heads too",
        )
    return Widths(
        asked.get("hidden_size", teacher.hidden_size),
        asked.get("intermediate_size", teacher.intermediate_size),
        heads,
        groups,
    )


def cut_width(
    model: PreTrainedModel, input_ids: torch.Tensor, widths: Widths, *, rescale_norms: bool = True
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Config and parameters of the narrower model; the model itself is left as it is.

    A norm divides by the root of the mean square over fewer channels than it learnt with. ``rescale_norms`` makes its weight
    ``sqrt(D / D' * s)`` times as large, which is exact where the kept share s of its input's energy is the same for all tokens.

    Args:
        model: The teacher.
        input_ids: ``[B, T]``, text to judge by.
        widths: Sizes of :func:`smaller`.
        rescale_norms: See above.

    Raises:
        ModelError: A parameter whose axes are not known, or of another shape than the config says.
    """
    teacher = widths_of(model.config)
    head_dim = model.config.head_dim if getattr(model.config, "head_dim", None) else _head_dim(teacher)
    for name, parameter in model.named_parameters():
        _check_shape(name, parameter, teacher, head_dim)
    importance = measure_importance(model, input_ids, teacher.num_attention_heads)
    hidden = keep_most(importance.hidden, widths.hidden_size)
    neurons = [keep_most(scores, widths.intermediate_size) for scores in importance.neurons]
    heads = [
        keep_heads(scores, teacher.num_key_value_heads, widths.num_attention_heads, widths.num_key_value_heads)
        for scores in importance.heads
    ]
    state = {}
    for name, tensor in model.state_dict().items():
        layer = _layer_of(name)
        kept = {"D": hidden}
        if layer is not None:
            queries, groups = heads[layer]
            kept |= {"F": neurons[layer], "H": _rows(queries, head_dim), "G": _rows(groups, head_dim)}
        for dim, axis in enumerate(_axes(name)):
            tensor = tensor.index_select(dim, kept[axis]) if axis in kept else tensor
        norm = name.removesuffix(".weight")
        if rescale_norms and norm in importance.shares and len(hidden) < teacher.hidden_size:
            share = float(importance.shares[norm][hidden].sum())
            tensor = tensor * (share * teacher.hidden_size / len(hidden)) ** 0.5
        state[name] = tensor
    config = type(model.config).from_dict(model.config.to_dict())
    for field in WIDTHS:
        setattr(config, field, getattr(widths, field))
    config.head_dim = head_dim
    return config, state


def measure_importance(model: PreTrainedModel, input_ids: torch.Tensor, num_heads: int) -> Importance:
    """Mean over positions of the activation's size, L2 over sequences: of norm outputs, of MLP neurons, of heads before o_proj.

    Args:
        model: In eval mode, with ``num_heads`` query heads.
        input_ids: ``[B, T]``; one sequence at a time runs.
        num_heads: H.
    """
    import torch

    squares: dict[str, torch.Tensor] = {}
    shares: dict[str, torch.Tensor] = {}

    def add(into: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        into[name] = into[name] + value if name in into else value

    def watch_norm(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            add(squares, name, output[0].double().abs().mean(0).square())
            energy = inputs[0][0].double().square()
            add(shares, name, (energy / energy.sum(1, keepdim=True)).mean(0) / len(input_ids))

        return hook

    def watch_input(name: str, parts: int | None) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            value = inputs[0][0].double()
            size = value.abs() if parts is None else value.view(len(value), parts, -1).norm(dim=2)
            add(squares, name, size.mean(0).square())

        return hook

    handles = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in NORMS:
            handles.append(module.register_forward_hook(watch_norm(name)))
        elif last in ("down_proj", "o_proj"):
            handles.append(module.register_forward_pre_hook(watch_input(name, num_heads if last == "o_proj" else None)))
    try:
        with torch.inference_mode():
            for row in input_ids.to(model.device):
                trunk_of(model)(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    scores = {name: value.sqrt() for name, value in squares.items()}
    return Importance(
        hidden=torch.stack([scores[name] for name in shares]).sum(0),
        neurons=[score for name, score in scores.items() if name.endswith("down_proj")],
        heads=[score for name, score in scores.items() if name.endswith("o_proj")],
        shares=shares,
    )


def keep_most(scores: torch.Tensor, number: int) -> torch.Tensor:
    """Indices of the highest scores, in ascending order: what is kept keeps its order."""
    return scores.topk(number).indices.sort().values


def keep_heads(
    scores: torch.Tensor, teacher_groups: int, num_heads: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query heads and key/value heads to keep: the groups whose best query heads score highest, equally many of each.

    Args:
        scores: ``[H]`` of the teacher's query heads.
        teacher_groups: Its key/value heads.
        num_heads: Query heads of the student.
        num_groups: Its key/value heads.
    """
    by_group = scores.view(teacher_groups, -1)
    best = by_group.topk(num_heads // num_groups, dim=1)
    groups = keep_most(best.values.sum(1), num_groups)
    inside = best.indices[groups].sort(dim=1).values
    queries: torch.Tensor = (groups[:, None] * by_group.shape[1] + inside).flatten()
    return queries, groups


def _rows(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    import torch

    rows: torch.Tensor = (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()
    return rows


def _head_dim(teacher: Widths) -> int:
    return teacher.hidden_size // teacher.num_attention_heads


def _axes(name: str) -> str | Sequence[str]:
    return AXES.get(".".join(name.split(".")[-2:]), "")


def _layer_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _check_shape(name: str, parameter: torch.Tensor, teacher: Widths, head_dim: int) -> None:
    sizes = {
        "D": teacher.hidden_size,
        "F": teacher.intermediate_size,
        "H": teacher.num_attention_heads * head_dim,
        "G": teacher.num_key_value_heads * head_dim,
    }
    axes = _axes(name)
    expected = tuple(sizes.get(axis, size) for axis, size in zip(axes, parameter.shape, strict=False))
    if len(axes) != parameter.ndim or expected != tuple(parameter.shape):
        raise ModelError(
            f"{name} {tuple(parameter.shape)}: "
            + (
                f"{expected} was expected" if axes else "no parameter of this name was expected in a model cut in width"
            ),
            hint="--layers 8 keeps 8 layers of a model of any family; --shape begins with random weights",
        )
