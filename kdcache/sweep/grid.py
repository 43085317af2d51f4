"""What a sweep varies: the grid, and an ordinary run of ``train-student`` for each of its points and seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import xxhash
import yaml
from pydantic import BeforeValidator, Field

from kdcache.cache.reader import open_cache
from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.config import Options, check_options
from kdcache.errors import ConfigError
from kdcache.train.checks import check_recipe
from kdcache.train.options import TrainOptions
from kdcache.train.run import stages_of

# Options that the sweep itself sets, and what serves instead.
OURS = {
    "output": "--output is the folder of the sweep; each student has one of its own inside",
    "seed": "--seeds N varies the seed",
    "resume": "a student whose folder is removed is trained anew",
}
# Not options of train-student: what a cache is cut down to, and what its spec calls that.
CUTS = {"top_k": "k", "top_p": "top_p"}
# To YAML 1.1 these are text, for want of a point or of a sign.
EXPONENTIAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _parse_grid(value: Any) -> Any:
    """``{"alpha": "0.5,0.7"}`` as well as lists."""
    if not isinstance(value, Mapping):
        return value
    grid: dict[str, list[Any]] = {}
    for name, given in ((str(name).replace("-", "_"), given) for name, given in value.items()):
        if name in grid:
            raise ValueError(f"{name} is given twice")
        many = [yaml.safe_load(part) for part in given.split(",")] if isinstance(given, str) else given
        grid[name] = [_as_number(one) for one in (many if isinstance(many, list) else [many])]
    return grid


def _as_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and EXPONENTIAL.fullmatch(value) else value


class SweepOptions(Options):
    """What is varied, and what is not."""

    output: Annotated[str, Field(description="Folder of the students, the table and the plot.")]
    grid: Annotated[
        dict[str, Annotated[list[Any], Field(min_length=1)]],
        BeforeValidator(_parse_grid),
        Field(
            min_length=1,
            description="Values of an option of train-student, as alpha=0.5,0.7; or top_k=64,32 and top_p=0.9,0.95, which make smaller caches first; cache=A,B compares caches, of other target schemes too. Can be "
            "given again: every combination is trained.",
        ),
    ]
    train: Annotated[
        dict[str, Any],
        Field(
            default_factory=dict,
            description="Any other option of train-student, the same for all: cache=C, student=S ... With --config its section "
            "train-student is taken first, but for output, seed and resume, which the sweep sets.",
        ),
    ]
    seeds: Annotated[int, Field(ge=1, description="Students of each combination, with seeds 0, 1, ...")] = 1
    teacher_cache: Annotated[
        str | None,
        Field(
            description="A hidden cache of held-out text: every student is evaluated on it, exactly. Without it eval_cache serves."
        ),
    ] = None
    metric: Annotated[str, Field(description="What the table is sorted by and the plot shows.")] = "forward_kl"


@dataclass(frozen=True, slots=True)
class Student:
    """One run of a sweep.

    Attributes:
        point: Grid option to value.
        seed: Of the run.
        folder: Its output.
        options: Of ``train-student``.
        caches: That it learns from, before they were cut down.
    """

    point: dict[str, Any]
    seed: int
    folder: Path
    options: TrainOptions
    caches: tuple[str, ...]


def plan_students(options: SweepOptions) -> Iterator[Student]:
    """Every combination and seed, checked; caches that the grid asks for are made."""
    for name in [*options.grid, *options.train]:
        if name not in TrainOptions.model_fields and name not in CUTS:
            check_options(TrainOptions, "train-student", {name: None})
    taken = [("grid", name) for name in options.grid if name in OURS or name in options.train]
    taken += [("train", name) for name in options.train if name in OURS]
    for flag, name in taken[:1]:
        raise ConfigError(
            f"--{flag} {name}: set once for all, or by the sweep itself",
            hint=OURS.get(name, f"leave it out of --train {name}"),
        )
    cut: dict[str, str] = {}  # by the name of its folder
    for values in product(*options.grid.values()):
        point = dict(zip(options.grid, values, strict=True))
        given = options.train | {name: value for name, value in point.items() if name not in CUTS}
        whole = given.get("cache")
        if any(name in point for name in CUTS):
            given["cache"] = _cut_down(options, whole, point, cut)
        for seed in range(options.seeds):
            name = "_".join([*(f"{key}={_named(key, value)}" for key, value in point.items()), f"seed={seed}"])
            folder = Path(options.output) / "students" / name.replace("/", "-").replace(":", "-")
            resolved = check_options(TrainOptions, "train-student", given | {"output": str(folder), "seed": seed})
            if seed == 0:
                check_recipes(resolved)
            caches = tuple(resolved.cache) if given.get("cache") == whole else (str(whole),)
            yield Student(point, seed, folder, resolved, caches)


def check_recipes(options: TrainOptions) -> None:
    """Refuse what a run would refuse once its turn comes, in any of its stages: a loss, schedule, temperature or mix that its caches cannot give.

    Raises:
        ConfigError: A stage would take a cache that is still being made: students of the same sweep would not learn from the same sequences.
        KDCacheError: As ``train-student`` says it.
    """
    for stage in stages_of(options):
        if stage.allow_incomplete:
            raise ConfigError(
                "allow_incomplete: a sweep compares students of the same sequences, and sums up what whole caches cost",
                hint="leave it out, and wait until the dump is done (kdcache status CACHE)",
            )
        check_recipe(stage)


def _cut_down(options: SweepOptions, cache: Any, point: dict[str, Any], made: dict[str, str]) -> str:
    """The cache of a point of the grid, which keeps fewer entries; made where that is not done."""
    axes = [name for name in CUTS if name in point]
    if not isinstance(cache, str):
        raise ConfigError(f"--grid {axes[0]}: one cache to cut down was expected", hint="--train cache=CACHE")
    targets = open_cache(cache).spec.targets
    wanted = {name: point[name] for name in axes if point[name] != getattr(targets, CUTS[name])}
    if not wanted:
        return cache
    parts = [_named("cache", cache)] if "cache" in options.grid else []
    name = "_".join([*parts, *(f"{axis}-{spelled(value)}" for axis, value in wanted.items())]).replace("/", "-")
    if name not in made:
        made[name] = str(Path(options.output) / "caches" / name)
        transcode(check_options(TranscodeOptions, "transcode", {"cache": cache, "output": made[name], **wanted}))
    return made[name]


def _named(axis: str, value: Any) -> str:
    """A value of the grid in the name of a folder; of a cache its last part, and something of the rest that tells namesakes apart."""
    if axis != "cache":
        return spelled(value)
    return f"{Path(str(value)).name}-{xxhash.xxh64_hexdigest(str(value).encode())[:6]}"


def spelled(value: Any) -> str:
    """A value of the grid, as it is shown and named."""
    return f"{value:.12g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
