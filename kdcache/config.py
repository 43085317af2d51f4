"""Options from three places: defaults in the model, a YAML file, flags; later ones win, unknown names are refused.

A config file is a mapping of option names, or has a section for each command (``dump-teacher:``, ``train-student:`` ...), so
that one file tells a whole story. The resolved options are written beside the output of every run, with the versions,
command line and device that produced it.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from kdcache.errors import ConfigError

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "numpy",
    "pyarrow",
    "zstandard",
    "safetensors",
)

OptionsT = TypeVar("OptionsT", bound="Options")


class Options(BaseModel):
    """Base of the options of a command: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def parse_weighted(value: Any) -> Any:
    """``"a:0.7"``, a list of such, or a mapping, as path to weight. A path without a weight has weight 1."""
    if isinstance(value, str | os.PathLike):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    out: dict[str, float] = {}
    for part in map(str, value):
        path, colon, weight = part.rpartition(":")
        try:
            path, number = (path, float(weight)) if colon and path else (part, 1.0)
        except ValueError:  # the colon belongs to the path, as in s3://bucket
            path, number = part, 1.0
        if path in out:
            raise ValueError(f"{path} is named twice")
        out[path] = number
    return out


def parse_mix(value: Any) -> Any:
    """``"teacher:0.7,real:0.3"``, a list of such, or a mapping, as name to share."""
    if not isinstance(value, str | list | tuple):
        return value
    mix: dict[str, float] = {}
    for part in (
        text.strip() for piece in ([value] if isinstance(value, str) else value) for text in str(piece).split(",")
    ):
        name, colon, share = part.rpartition(":")
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if not (colon and name):
            raise ValueError(f"shares were expected, as teacher:0.7,real:0.3; found {part!r}")
        if name in mix:
            raise ValueError(f"{name} is named twice")
        mix[name] = number
    return mix


def parse_stages(value: Any) -> Any:
    """``"alpha=0 max_steps=50"``, or a list of such or of mappings, as mappings."""
    if isinstance(value, str | dict):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [_stage(part) if isinstance(part, str) else part for part in value]


def _stage(text: str) -> dict[str, Any]:
    stage: dict[str, Any] = {}
    for part in shlex.split(text):
        name, equals, given = part.partition("=")
        if not equals:
            raise ValueError(f"OPTION=VALUE was expected, as in 'alpha=0 max_steps=50'; found {part!r}")
        stage[name.lstrip("-").replace("-", "_")] = yaml.safe_load(given)
    return stage


def one_or_many(value: Any) -> Any:
    """A path, or a list of them, as a list."""
    return [value] if isinstance(value, str | os.PathLike) else value


def _check_weights(weights: dict[str, float]) -> dict[str, float]:
    if not all(0 < weight < float("inf") for weight in weights.values()):
        raise ValueError("weights are above 0")
    return weights


WeightedPaths = Annotated[dict[str, float], BeforeValidator(parse_weighted), AfterValidator(_check_weights)]
Shares = Annotated[dict[str, float], BeforeValidator(parse_mix), AfterValidator(_check_weights)]
Paths = Annotated[list[str], BeforeValidator(one_or_many)]
Stages = Annotated[list[dict[str, Any]], BeforeValidator(parse_stages)]


def parse_temperatures(value: Any) -> Any:
    """``"1,2,4"`` as well as a list; 1 is always there, and comes first."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if isinstance(value, int | float):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    try:
        numbers = sorted({float(part) for part in value} | {1.0})
    except ValueError:
        raise ValueError("numbers separated by commas were expected, as 1,2,4") from None
    if numbers[0] <= 0 or numbers[-1] > 1000 or len(numbers) > 16:
        raise ValueError("at most 16 temperatures, above 0 and up to 1000")
    return (1.0, *(number for number in numbers if number != 1.0))


Temperatures = Annotated[tuple[float, ...], BeforeValidator(parse_temperatures)]


def resolve_options(kind: type[OptionsT], command: str, flags: Mapping[str, Any], config: str | None) -> OptionsT:
    """Options of a command: defaults, then the config file, then the flags that were given (those not None).

    Args:
        kind: The command's option model.
        command: Its name, also the name of its section in a config file.
        flags: Flag name to value; None means not given.
        config: Path of a YAML file, or None.

    Raises:
        ConfigError: An unknown option (with the nearest known one), or a value that does not fit.
    """
    values = {} if config is None else read_section(config, command)
    values |= {name: value for name, value in flags.items() if value is not None}
    return check_options(kind, command, values, "" if config is None else f" ({config})")


def check_options(kind: type[OptionsT], command: str, values: Mapping[str, Any], where: str = "") -> OptionsT:
    """Options of a command from their values.

    Raises:
        ConfigError: An unknown option (with the nearest known one), or a value that does not fit.
    """
    known = [field.alias or name for name, field in kind.model_fields.items()]
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{command}: there is no option {name!r}{where}",
                hint=_suggestion(name, known),
            )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "options"
        if first["type"] == "missing":
            raise ConfigError(
                f"{command}: --{place.replace('_', '-')} is needed", hint=f"kdcache {command} --help"
            ) from error
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{command}: {place}: {message} (found {first.get('input')!r})", hint=f"kdcache {command} --help"
        ) from error


def read_section(config: str, command: str) -> dict[str, Any]:
    """A command's options out of a YAML file; dashes in names become underscores."""
    try:
        raw = yaml.safe_load(Path(config).read_text()) or {}
    except OSError as error:
        raise ConfigError(f"config file {config}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {config}: not YAML ({error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {config}: not text ({error})") from error
    if isinstance(raw, dict) and command in raw:
        raw = raw[command] or {}
    elif isinstance(raw, dict) and any(isinstance(value, dict) and "-" in str(key) for key, value in raw.items()):
        raw = {}  # a story of several commands that leaves this one at its defaults
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {config}: a mapping of option names was expected, found {type(raw).__name__}")
    return {str(name).replace("-", "_"): value for name, value in raw.items()}


def provenance(command: str, options: BaseModel, device: str, **more: Any) -> dict[str, Any]:
    """What produced a result: versions, command line, device, every option as resolved."""
    return {
        "command": command,
        "argv": sys.argv,
        "device": device,
        **more,
        "versions": library_versions(),
        "options": options.model_dump(mode="json", by_alias=True),
    }


def run_files(name: str, command: str, options: BaseModel, device: str, **more: Any) -> dict[str, bytes]:
    """``<name>.yaml`` (a config file that repeats the run) and ``<name>.provenance.json``, by file name."""
    resolved = {command: options.model_dump(mode="json", exclude_none=True, by_alias=True)}
    return {
        f"{name}.yaml": yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).encode(),
        f"{name}.provenance.json": (json.dumps(provenance(command, options, device, **more), indent=2) + "\n").encode(),
    }


def run_name() -> str:
    """Of one run over a cache: many processes may work at it, each leaves its own files."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"


def write_provenance(folder: Path, name: str, command: str, options: BaseModel, device: str, **more: Any) -> None:
    """Write :func:`run_files` into a folder; ``more`` stands in the provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in run_files(name, command, options, device, **more).items():
        replace_file(folder / file, data.decode())


def replace_file(path: Path, text: str) -> None:
    """Write a file whole, over what stands there: who reads it, or goes on after a crash, never meets half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_mapping(path: Path) -> dict[str, Any] | None:
    """A mapping of JSON; None where there is none, or what a crash has left of it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def library_versions() -> dict[str, str]:
    """Versions of Python, kdcache and the libraries that can move a number."""
    versions = {"python": platform.python_version()}
    for package in ("kdcache", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known options: " + ", ".join(known)
