"""Shares of tokens: exact wherever the order is cut, nothing lost, nothing seen twice before all else was."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.config import parse_mix, parse_stages
from kdcache.train.mix import Group, Mix


def make_group(name, share, first, sizes, seed):
    def permutation(number):
        return np.random.default_rng([seed, number]).permutation(len(sizes))

    return Group(name, share, first + np.arange(len(sizes)), np.array(sizes), permutation)


@st.composite
def mixes(draw):
    lists = draw(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=1, max_size=4))
    shares = np.array(draw(st.lists(st.integers(1, 20), min_size=len(lists), max_size=len(lists))), dtype=float)
    shares /= shares.sum()
    first, groups = 0, []
    for number, (sizes, share) in enumerate(zip(lists, shares, strict=True)):
        groups.append(make_group(f"g{number}", float(share), first, sizes, number))
        first += len(sizes)
    return Mix(tuple(groups))


def endless(mix, epochs):
    return np.concatenate([mix.order(epoch) for epoch in range(epochs)])


@settings(max_examples=60, deadline=None)
@given(mixes(), st.integers(1, 4))
def test_no_group_is_further_from_its_share_than_a_sequence(mix, epochs):
    order = endless(mix, epochs)
    sizes = np.concatenate([group.num_targets for group in mix.groups])
    longest = sizes.max()
    total = np.cumsum(sizes[order])
    for group in mix.groups:
        own = np.cumsum(np.where(np.isin(order, group.indices), sizes[order], 0))
        assert (np.abs(own - group.share * total) <= longest * len(mix.groups)).all()
        if len(mix.groups) == 2:
            assert (np.abs(own - group.share * total) <= longest).all()


@settings(max_examples=60, deadline=None)
@given(mixes(), st.integers(1, 4))
def test_each_group_goes_through_its_own_permutations(mix, epochs):
    order = endless(mix, epochs)
    assert len(order) == epochs * mix.epoch_length
    for group in mix.groups:
        own = order[np.isin(order, group.indices)]
        alone = np.concatenate(
            [group.indices[group.permutation(number)] for number in range(len(own) // len(group.indices) + 1)]
        )
        assert own.tolist() == alone[: len(own)].tolist()


def test_an_epoch_ends_with_the_first_group():
    short, long = make_group("teacher", 0.5, 0, [10] * 6, 0), make_group("real", 0.5, 6, [10] * 40, 1)
    mix = Mix((short, long))
    assert mix.epoch_length == 12
    first, second = mix.order(0), mix.order(1)
    assert sorted(first[first < 6]) == list(range(6))
    real = np.concatenate([first[first >= 6], second[second >= 6]])
    assert len(set(real)) == len(real) == 12, "what was left comes next"


def test_one_group_is_its_permutation():
    alone = make_group("real", 1.0, 0, [3, 1, 4, 1, 5], 0)
    assert Mix((alone,)).order(2).tolist() == alone.permutation(2).tolist()


@pytest.mark.parametrize("value", ["teacher:0.7,real:0.3", ["teacher:0.7", "real:0.3"], ["teacher:0.7,real:0.3"]])
def test_spellings(value):
    assert parse_mix(value) == {"teacher": 0.7, "real": 0.3}


@pytest.mark.parametrize(
    ("value", "says"), [("teacher", "as teacher:0.7"), ("real:1,real:2", "named twice"), (":3", "as teacher")]
)
def test_bad_spellings(value, says):
    with pytest.raises(ValueError, match=says):
        parse_mix(value)


def test_stages_are_spelled_like_flags():
    assert parse_stages("alpha=0 max-steps=50 cache='a b'") == [{"alpha": 0, "max_steps": 50, "cache": "a b"}]
    with pytest.raises(ValueError, match="OPTION=VALUE"):
        parse_stages(["alpha"])
