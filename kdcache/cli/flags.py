"""Flags out of an option model, so that names, defaults and help are written once, where the options are."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from kdcache.config import Options, WeightedPaths

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def flags_of(model: type[Options], *, without: tuple[str, ...] = ()) -> Callable[[CommandT], CommandT]:
    """Add ``--config`` and a flag for every option of a model. A flag that is not given is None: the file or default decides.

    Args:
        model: The options.
        without: Options that only a config file can hold.
    """

    def decorate(function: CommandT) -> CommandT:
        for name, field in reversed(model.model_fields.items()):
            if name not in without:
                function = _flag(name, field)(function)
        config_help = "YAML file with any of these options; flags win."
        return click.option("--config", type=click.Path(dir_okay=False), help=config_help)(function)

    return decorate


def _flag(name: str, field: FieldInfo) -> Callable[[CommandT], CommandT]:
    label = (field.alias or name).replace("_", "-")
    kind = _bare(field.annotation)
    text = field.description or ""
    if field.is_required():
        text += "  [required]"
    elif not (field.default in (None, "", ()) or kind in (dict, list)):
        text += f"  [default: {_shown(field.default)}]"
    key = field.alias or name
    if kind is bool:
        return click.option(f"--{label}/--no-{label}", _safe(key), default=None, help=text)
    if get_origin(kind) is Literal:
        return click.option(f"--{label}", _safe(key), type=click.Choice(get_args(kind)), default=None, help=text)
    if field.annotation == get_args(WeightedPaths)[0]:
        return click.option(
            f"--{label}", _safe(key), multiple=True, metavar=field.title or "CACHE[:WEIGHT]", callback=_as_list, help=text
        )  # fmt: skip
    if kind is list or field.annotation == tuple[str, ...]:
        return click.option(
            f"--{label}", _safe(key), multiple=True, metavar=field.title or "NAME", callback=_as_list, help=text
        )
    if kind is dict:
        return click.option(f"--{label}", _safe(key), multiple=True, metavar="FIELD=VALUE", help=text)
    click_type = {int: click.INT, float: click.FLOAT}.get(kind, click.STRING)
    return click.option(f"--{label}", _safe(key), type=click_type, default=None, help=text)


def _as_list(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    """Not ``field=value`` pairs, which come as a tuple; None where the flag was not given."""
    return list(value) or None


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags as options: repeated ``field=value`` become a mapping, Python's reserved words lose their underscore."""
    out: dict[str, Any] = {}
    for name, value in flags.items():
        key = name.removesuffix("_")
        if isinstance(value, tuple):
            out[key] = _mapping(value) if value else None
        else:
            out[key] = value
    return out


def _mapping(pairs: tuple[str, ...]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in map(_pair, pairs):
        if name in out:
            raise click.BadParameter(f"{name} is given twice, as {out[name]} and {value}")
        out[name] = value
    return out


def _pair(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"field=value was expected, found {text!r}")
    return name, yaml.safe_load(value)


def _safe(name: str) -> str:
    return f"{name}_" if name == "from" else name


def _bare(annotation: Any) -> Any:
    """``int`` out of ``Annotated[int, ...] | None``."""
    while True:
        origin = get_origin(annotation)
        if origin in (Union, types.UnionType):
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        elif hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
        elif origin in (dict, list, tuple):
            return origin
        else:
            return annotation


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
