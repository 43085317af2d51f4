"""Shares of tokens: to one sequence wherever the order is cut, nothing lost, nothing seen twice before all else was."""

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
    lists = draw(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=1, max_size=5))
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
        assert (np.abs(own - group.share * total) <= longest).all()
        ahead, behind = (own - group.share * total).max(), (group.share * total - own).max()
        own_longest = (1 - group.share) * group.num_targets.max()
        assert ahead <= own_longest + 1e-6 and behind <= group.share * longest + own_longest + 1e-6


def test_a_group_of_a_large_share_does_not_wait_for_those_named_before_it():
    """Of three at 10, 10 and 80 per cent the last comes first."""
    mix = Mix(tuple(make_group(f"g{n}", share, 100 * n, [10] * 80, n) for n, share in enumerate((0.1, 0.1, 0.8))))
    turns = mix.order(0) // 100
    assert turns[:10].tolist() == [2, 0, 2, 2, 2, 2, 1, 2, 2, 2]
    assert (np.bincount(turns) == [10, 10, 80]).all()


@pytest.mark.parametrize(
    ("sizes", "share"), [(([2] * 5, [50] * 9, [1] * 400), (0.1, 0.6, 0.3)), (([7, 1], [3] * 9), (0.01, 0.99))]
)
def test_an_epoch_is_all_of_one_group_and_nothing_twice(sizes, share):
    starts = np.cumsum([0, *map(len, sizes)])
    mix = Mix(tuple(make_group(f"g{n}", share[n], starts[n], sizes[n], n) for n in range(len(sizes))))
    first = mix.order(0).tolist()
    assert len(set(first)) == len(first)
    assert any(set(group.indices.tolist()) <= set(first) for group in mix.groups)


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
