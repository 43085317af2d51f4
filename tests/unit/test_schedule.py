"""Schedules: what they are at their ends and between, how they are written, what is refused."""

import pytest

from kdcache.train.schedule import Schedule, parse_schedule


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("0.9", {0: 0.9, 0.5: 0.9, 1: 0.9}),
        ("linear:0.1:0.9", {0: 0.1, 0.25: 0.3, 1: 0.9}),
        ("cosine:0:1", {0: 0.0, 0.5: 0.5, 1: 1.0, 1 / 3: 0.25}),
        ("wsd:0:0.9:0", {0: 0.0, 0.05: 0.45, 0.1: 0.9, 0.8: 0.9, 0.9: 0.45, 1: 0.0}),
        ("wsd:0:1:0.5:0.2:0.4", {0.1: 0.5, 0.2: 1.0, 0.6: 1.0, 0.8: 0.75, 1: 0.5}),
        ("wsd:0:1:0:0:0", {0: 1.0, 1: 1.0}),
    ],
)
def test_values(text, points):
    schedule = parse_schedule(text)
    for progress, value in points.items():
        assert schedule.at(progress) == pytest.approx(value)
    assert schedule.at(-1) == schedule.at(0)
    assert schedule.at(2) == schedule.at(1)


@pytest.mark.parametrize("text", ["0.9", "linear:0.1:0.9", "wsd:0:0.9:0", "wsd:0:1:0.5:0.2:0.4"])
def test_written_as_read(text):
    assert str(parse_schedule(text)) == text
    assert parse_schedule(parse_schedule(text)) == parse_schedule(text)


def test_a_number_is_constant():
    assert parse_schedule(2) == Schedule("constant", (2.0,))
    assert parse_schedule("linear:1:1").is_constant
    assert not parse_schedule("linear:1:2").is_constant


@pytest.mark.parametrize(
    "text",
    ["", "x", "linear:1", "linear:1:2:3", "wsd:1:2", "step:1:2", "nan", "inf", "wsd:0:1:0:0.8:0.4", "wsd:0:1:0:-1"],
)
def test_refused(text):
    with pytest.raises(ValueError, match="expected|shares of the run"):
        parse_schedule(text)
