"""Options of ``kdcache evaluate``: names, defaults, meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kdcache.config import Options


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class EvaluateOptions(Options):
    """What is held against what."""

    student: Annotated[
        Names,
        Field(
            min_length=1,
            description="Student: hub name or model folder. Given again: students of one recipe with other seeds, shown as mean and spread.",
        ),
    ]
    teacher_cache: Annotated[
        str,
        Field(
            description="Cache of held-out text, made with dump-teacher --targets hidden: everything is exact. From top_k and top_p "
            "divergences are lower bounds."
        ),
    ]
    baseline: Annotated[
        Names,
        Field(description="Students to compare with, trained on labels alone as a rule; given again: other seeds."),
    ] = ()
    full: Annotated[
        str | None,
        Field(
            description="A student trained from the teacher's whole distribution: the far end of the gap from the baseline. Without it the "
            "teacher is."
        ),
    ] = None
    output: Annotated[str | None, Field(description="Also write the result to this JSON file.")] = None
    report: Annotated[str | None, Field(description="Also write a page to this HTML file, which needs no network.")] = (
        None
    )
    prompts: Annotated[
        str | None,
        Field(
            description="Dataset of prompts that the models answer, side by side: prompt (text or a chat) with or without completion, or "
            "messages, whose last answer is the reference."
        ),
    ] = None
    split: Annotated[
        str, Field(description="Split of --prompts with an optional slice: train, train[:90%], test[100:200].")
    ] = "train"
    num_prompts: Annotated[int, Field(ge=1, description="The first of them that are answered.")] = 20
    max_new_tokens: Annotated[
        int, Field(ge=1, le=1 << 20, description="Of an answer; each is the most probable one.")
    ] = 64
    chat: Annotated[
        bool, Field(description="A prompt of plain text is what a user says: put it through the chat template.")
    ] = False
    teacher: Annotated[
        str | None,
        Field(description="The teacher itself, for its answers and tasks; loaded alone, after the students."),
    ] = None
    tasks: Annotated[
        Names,
        Field(description="A task of lm-eval, or a YAML file with one; can be given again. Needs kdcache[eval]."),
    ] = ()
    task_limit: Annotated[int | None, Field(ge=1, description="Examples of each task; all unless given.")] = None
    num_resamples: Annotated[
        int, Field(ge=100, le=100_000, description="Bootstrap samples behind the intervals of differences.")
    ] = 1000
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        Field(
            description="Of students and --teacher; auto is what a model's config says.  [default: float32 for students, auto for the teacher]"
        ),
    ] = None
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1 ...")] = "auto"
    device_map: Annotated[
        str | None, Field(description="Spread students and --teacher over GPUs: auto, balanced ...")
    ] = None
    trust_remote_code: Annotated[bool, Field(description="Run code that ships with the model.")] = False
