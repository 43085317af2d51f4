"""Options of ``kdcache evaluate``: names, defaults, meaning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kdcache.config import Options


class EvaluateOptions(Options):
    """What is held against what."""

    student: Annotated[str, Field(description="Student: hub name or model folder.")]
    teacher_cache: Annotated[str, Field(description="Cache made with dump-teacher --targets hidden.")]
    baseline: Annotated[str | None, Field(description="A second student to compare with.")] = None
    output: Annotated[str | None, Field(description="Also write the result to this JSON file.")] = None
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1 ...")] = "auto"
    trust_remote_code: Annotated[bool, Field(description="Run code that ships with the model.")] = False
