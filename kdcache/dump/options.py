"""Options of ``kdcache dump-teacher``: one place for names, defaults and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kdcache.config import Options

DEFAULT_SHARD_POSITIONS = 65_536
MIN_SHARDS = 16


class DumpOptions(Options):
    """What a dump does. None means: decided by the plan, and then kept by it."""

    teacher: str
    dataset: str
    output: str
    split: str = "train"
    dataset_config: str | None = None
    text_column: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    seq_len: Annotated[int, Field(ge=2)] = 1024
    packing: bool = True
    append_eos: bool = True
    assistant_only: bool = True

    targets: Literal["top_k", "hidden"] = "top_k"
    top_k: Annotated[int, Field(ge=1)] = 64
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    codec: Literal["packed", "exact"] = "packed"

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str = "sdpa"
    device: str = "auto"
    device_map: str | None = None
    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    threads: Annotated[int, Field(ge=1)] | None = None
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    shard_positions: Annotated[int, Field(ge=1)] | None = None

    @field_validator("temperatures", mode="before")
    @classmethod
    def _parse_temperatures(cls, value: Any) -> Any:
        """``"1,2,4"`` as well as a list; 1 is always there, and comes first."""
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        if isinstance(value, int | float):
            value = [value]
        if not isinstance(value, list | tuple):
            return value
        numbers = sorted({float(part) for part in value} | {1.0})
        if numbers[0] <= 0:
            raise ValueError("temperatures are above 0")
        return (1.0, *(number for number in numbers if number != 1.0))
