"""The sections of a report that show text: one document token by token, and answers side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from kdcache.evaluate.page import NAMES, paragraph, table
from kdcache.evaluate.plots import escape

Found = dict[str, Any]
STRIP_LEVELS = (0.25, 1.0, 2.0, 4.0)
NUM_WORST = 8


def _visible(text: str) -> str:
    """A token to be read: a line break is seen as one."""
    return text.replace("\n", "⏎")


def _choices(some: Sequence[Sequence[Any]]) -> str:
    return "  ".join(f"“{_visible(text)}” {probability:.0%}" for text, probability in some)


def token_section(found: Found) -> Iterator[str]:
    """One held-out document, coloured by divergence; where it is largest; and all of it as a table."""
    if "strip" not in found:
        return
    strip = found["strip"]
    who = NAMES[strip["role"]]  # the baseline, where the student diverged
    yield "<h2>Token by token</h2>"
    yield paragraph(
        f"A held-out text of middling difficulty. The stronger a token's colour, the farther the {who}'s distribution over it is "
        "from the teacher's; touch or point at a token for what both would have said.", soft=True,
    )  # fmt: skip
    edges = [0.0, *STRIP_LEVELS]
    names = [f"{a:g} to {b:g}" for a, b in pairwise(edges)] + [f"{edges[-1]:g} and more"]
    keys = "".join(f'<span class="h{i}">{name}</span>' for i, name in enumerate(names))
    yield f'<p class="soft key">KL(teacher‖{who}), nats: {keys}</p>'
    spans = [f"<span>{escape(strip['before'])}</span>"]
    for token in strip["tokens"]:
        level = sum(token["forward_kl"] >= edge for edge in STRIP_LEVELS)
        said = (
            f"“{_visible(token['shown'])}”  KL {token['forward_kl']:.2f} nats, {who} gave it {token['probability']:.1%}\n"
            f"teacher  {_choices(token['teacher'])}\n{who}  {_choices(token['student'])}"
        )
        text = re.sub(r"\n+", lambda run: "⏎" * len(run[0]) + "\n", token["text"])
        spans.append(f'<span class="h{level}" tabindex="-1" data-said="{escape(said)}">{escape(text)}</span>')
    yield f'<div class="strip" dir="auto">{"".join(spans)}</div>'
    texts = [strip["before"], *(token["text"] for token in strip["tokens"])]
    befores = list(accumulate(texts))
    order = sorted(range(len(strip["tokens"])), key=lambda i: -strip["tokens"][i]["forward_kl"])
    head = ("after … the text has", "KL, nats", "teacher's first choice", f"{who}'s first choice")
    yield table(
        "Where they differ most",
        head,
        [_strip_row(strip, befores, i) for i in order[:NUM_WORST]],
        text_columns=[0, 2, 3],
    )
    every = table("In order", head, [_strip_row(strip, befores, i) for i in sorted(order)], text_columns=[0, 2, 3])
    yield f"<details><summary>every token as a table</summary>{every}</details>"


def _strip_row(strip: Found, befores: Sequence[str], index: int) -> list[str]:
    token = strip["tokens"][index]
    before = _visible(befores[index][-18:])
    first = [_choices(token[who][:1]) for who in ("teacher", "student")]
    return [
        f'<span class="long">…{escape(before)} </span><strong>{escape(_visible(token["shown"]))}</strong>',
        f"{token['forward_kl']:.2f}",
        *map(escape, first),
    ]


def answers_section(found: Found) -> Iterator[str]:
    """What each model answers to each prompt, and how near that is to the reference and to the teacher."""
    if "generations" not in found:
        return
    said = found["generations"]
    order = [role for role in ("teacher", "student", "baseline", "full") if role in said["means"]]
    kinds = {
        "rouge_l_reference": "ROUGE-L to reference",
        "rouge_l_teacher": "ROUGE-L to teacher",
        "words": "words",
        "repetition": "repeated 4-grams",
    }
    shapes = {"words": "{:.1f}", "repetition": "{:.1%}"}
    shown = [kind for kind in kinds if any(kind in said["means"][role] for role in order)]
    rows = [
        [escape(NAMES[role]), *(shapes.get(k, "{:.3f}").format(said["means"][role][k]) if k in said["means"][role] else "" for k in shown)]
        for role in order
    ]  # fmt: skip
    yield "<h2>Answers side by side</h2>"
    yield table(f"Means over {len(said['prompts'])} prompts", ["", *(kinds[kind] for kind in shown)], rows)
    yield paragraph(
        f"The most probable token at every step, at most {said['max_new_tokens']} of them. ROUGE-L is the F1 of the longest common subsequence of "
        "words: 1 is the same text.", soft=True,
    )  # fmt: skip
    for number, one in enumerate(said["prompts"], start=1):
        yield f'<h3>Prompt {number}</h3>\n<p class="said prompt" dir="auto">{escape(one["prompt"])}</p>\n<div class="answers">'
        for role in order:
            scores = ", ".join(f"{value:.2f} to {to}" for to, value in one["rouge_l"][role].items())
            yield _answer(NAMES[role], one["answers"][role], scores)
        if one["reference"] is not None:
            yield _answer("reference", one["reference"], "")
        yield "</div>"


def _answer(name: str, text: str, scores: str) -> str:
    # A model that ends in line breaks must not push everything else off the page.
    text = re.sub(r"\n{3,}", lambda run: f"\n⏎ × {len(run[0])}\n", text.lstrip(" "))
    note = f'<p class="soft">ROUGE-L {escape(scores)}</p>' if scores else ""
    return f'<div class="answer"><h4>{escape(name)}</h4><p class="said" dir="auto">{escape(text) or "(nothing)"}</p>{note}</div>'
