"""A cache made from a cache holds what a dump with those settings would have, and can be stopped anywhere."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kdcache.cache.commit import commit_name, commit_shard, publish_plan, read_plan, seal
from kdcache.cache.quality import QUALITIES, describe_codec, error_of_levels
from kdcache.cache.reader import open_cache
from kdcache.cache.store import LocalStore
from kdcache.cache.transcode import TranscodeOptions, plan_of, transcode
from kdcache.cache.verify import verify_cache
from kdcache.cli import main
from kdcache.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, ConfigError
from kdcache.targets import keep_entries, keep_most_probable, keep_temperatures, keep_top_p
from tests.strategies import (
    all_files,
    build_shard,
    make_plan,
    make_row,
    put_shard,
    targets_from_logits,
    write_cache,
    zipf_logits,
)

EXACT = make_plan(codec__name="exact", targets__temperatures=[1.0, 2.0, 4.0])


@pytest.fixture
def source(tmp_path):
    return write_cache(tmp_path / "source", EXACT)


def changed(source, tmp_path, name="new", **options):
    transcode(TranscodeOptions(cache=str(source), output=str(tmp_path / name), **options))
    return open_cache(tmp_path / name)


def kdcache(*arguments):
    return CliRunner().invoke(main, ["-q", *map(str, arguments)])


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 4.0), (1.0, 2.0, 4.0)])
def test_fewer_entries_and_temperatures_equal_a_dump_of_them(k, temperatures):
    rng = np.random.default_rng(0)
    logits, labels = zipf_logits(rng, 40, 300), rng.integers(0, 300, 40)
    all_of_them = targets_from_logits(logits, labels, 8, (1.0, 2.0, 4.0))
    wanted = targets_from_logits(logits, labels, k, temperatures)
    for found in (
        keep_most_probable(keep_temperatures(all_of_them, temperatures), k),
        keep_temperatures(keep_most_probable(all_of_them, k), temperatures),
    ):
        assert found.temperatures == temperatures
        np.testing.assert_array_equal(found.token_ids, wanted.token_ids)
        np.testing.assert_array_equal(found.num_entries, wanted.num_entries)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-6)
        np.testing.assert_allclose(found.tail_logprobs, wanted.tail_logprobs, atol=2e-5)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.7, 0.95, 1.0])
def test_the_fewest_entries_that_have_a_mass(top_p):
    """Against adding up position by position; a position without entries, and ties, which the lower ids win."""
    rng = np.random.default_rng(0)
    logits = np.round(zipf_logits(rng, 40, 300), 1)
    all_of_them = targets_from_logits(logits, rng.integers(0, 300, 40), 8)
    kept = np.ones(320, bool)
    kept[8:16] = False
    all_of_them = keep_entries(all_of_them, kept)
    wanted = []
    for n in range(40):
        entries = slice(*all_of_them.offsets[n : n + 2])
        pairs = sorted(zip(-all_of_them.logprobs[entries].astype(float), all_of_them.token_ids[entries], strict=True))
        mass, some = 0.0, []
        for cost, token in pairs:
            if some and mass >= top_p:
                break
            some.append(int(token))
            mass += np.exp(-cost)
        wanted.append(sorted(some))
    found = keep_top_p(all_of_them, top_p)
    assert np.split(found.token_ids, found.offsets[1:-1])[1].size == 0
    assert [ids.tolist() for ids in np.split(found.token_ids, found.offsets[1:-1])] == wanted
    for temperature in found.temperatures:  # nothing is lost: what goes joins the tail
        entries, tail = found.at_temperature(temperature)
        sums = np.exp(tail.astype(float)) + np.bincount(
            np.repeat(np.arange(40), found.num_entries), np.exp(entries), 40
        )
        np.testing.assert_allclose(sums, 1, atol=1e-5)
    assert (keep_top_p(found, top_p).token_ids == found.token_ids).all()


def test_of_equal_entries_the_lower_ids_stay():
    logits = np.zeros((2, 9))
    targets = targets_from_logits(logits, np.zeros(2, int), 6)
    assert keep_most_probable(targets, 2).token_ids.tolist() == [0, 1, 0, 1]


def test_all_entries_kept_is_the_same_and_none_kept_is_all_tail():
    rng = np.random.default_rng(0)
    targets = targets_from_logits(zipf_logits(rng, 5, 50), np.zeros(5, int), 8)
    same = keep_entries(targets, np.ones(40, bool))
    np.testing.assert_allclose(same.tail_logprobs, targets.tail_logprobs, atol=1e-6)
    nothing = keep_entries(targets, np.zeros(40, bool))
    np.testing.assert_allclose(nothing.tail_logprobs, 0, atol=1e-6)
    assert not len(nothing.token_ids) and not nothing.num_entries.any()


def test_entries_drawn_at_no_temperature_that_is_left_go_and_exact_ones_stay():
    rng = np.random.default_rng(0)
    base = targets_from_logits(zipf_logits(rng, 1, 50), np.zeros(1, int), 4, (1.0, 2.0))
    counts = np.array([[3, 0], [0, 2], [0, 0], [1, 1]], np.uint16)  # drawn at 1, at 2, exact, at both
    targets = keep_entries(base, np.ones(4, bool))
    targets = type(base)(**{name: getattr(targets, name) for name in base.__slots__ if name != "counts"}, counts=counts)
    at_1 = keep_temperatures(targets, (1.0,))
    assert at_1.token_ids.tolist() == targets.token_ids[[0, 2, 3]].tolist()
    assert at_1.counts.tolist() == [[3], [0], [1]]
    np.testing.assert_allclose(at_1.weights_at(1.0).sum(), targets.weights_at(1.0).sum(), atol=1e-6)


def test_a_transcoded_cache_is_a_cache(source, tmp_path):
    new = changed(source, tmp_path, top_k=3, temperatures="1,2", codec="packed")
    old = open_cache(source.root)
    assert (new.spec.targets.k, new.temperatures, new.codec.name) == (3, (1.0, 2.0), "packed")
    assert new.spec.transcoded_from == old.manifest.fingerprint != new.manifest.fingerprint
    assert verify_cache(new.store).intact and len(new) == len(old) == 10
    for index in range(len(old)):
        _, wanted = make_row(make_plan(targets__k=3), index)
        row = new[index]
        np.testing.assert_array_equal(row.sequence.input_ids, old[index].sequence.input_ids)
        np.testing.assert_array_equal(row.targets.token_ids, wanted.token_ids)
        bound = new.codec.logprob_error_bound(wanted.logprobs)
        assert (np.abs(row.targets.logprobs - wanted.logprobs) <= bound).all()
    assert new.manifest.stats.num_entries < old.manifest.stats.num_entries
    assert new.manifest.stats.num_rows == old.manifest.stats.num_rows
    assert 0 < new.manifest.stats.sum_codec_kl / new.manifest.stats.num_kl_targets < 1e-3


def test_what_became_of_answers_is_still_told(tmp_path):
    """The text is the same, so is what was dropped on the way to it."""
    store, dropped = LocalStore(tmp_path / "source"), {"num_answers_short": 3, "num_answers_duplicate": 1}
    publish_plan(store, EXACT)
    for shard in range(EXACT.spec.num_shards):
        data, stats = build_shard(EXACT, shard)
        commit_shard(store, EXACT, shard, data, stats.model_copy(update=dropped), worker="w", seconds=0.0)
    seal(store)
    new = changed(store.root, tmp_path, top_k=3)
    assert (new.manifest.stats.num_answers_short, new.manifest.stats.num_answers_duplicate) == (12, 4)


def test_top_k_becomes_top_p_and_top_p_smaller(source, tmp_path):
    new = changed(source, tmp_path, "nine", top_p=0.9)
    assert (new.spec.targets.scheme, new.spec.targets.k, new.spec.targets.top_p) == ("top_p", 8, 0.9)
    assert verify_cache(new.store).intact
    for row, old in zip(new, open_cache(source.root), strict=True):
        np.testing.assert_array_equal(row.targets.token_ids, keep_top_p(old.targets, 0.9).token_ids)
    smaller = changed(new.store.root, tmp_path, "five", top_p=0.5, top_k=4)
    assert smaller.manifest.stats.num_entries < new.manifest.stats.num_entries
    assert max(int(row.targets.num_entries.max(initial=0)) for row in smaller) <= 4
    with pytest.raises(ConfigError, match=r"--top-p 0.95: the cache keeps a mass of 0.9"):
        changed(new.store.root, tmp_path, "more", top_p=0.95)


def test_stopped_anywhere_it_ends_in_the_same_bytes(source, tmp_path):
    whole = changed(source, tmp_path, "whole", top_k=3)
    changed(source, tmp_path, "again", top_k=3)
    for shard in (1, 3):
        (tmp_path / "again" / commit_name(shard)).unlink()
    (tmp_path / "again" / "manifest.json").unlink()
    changed(source, tmp_path, "again", top_k=3)
    kept = ("shards", "plan.json", "manifest.json")
    one, two = (
        {n: d for n, d in all_files(tmp_path / name).items() if n.startswith(kept)} for name in ("whole", "again")
    )
    assert one == two
    assert whole.manifest.sealed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "the cache keeps 8 entries"),
        ({"top_k": 9, "top_p": 0.5}, "the cache keeps 8 entries"),
        ({"temperatures": "1,3"}, "declared are 1, 2, 4"),
    ],
)
def test_what_the_cache_cannot_give_is_refused(source, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        changed(source, tmp_path, **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{"quality": "high"}, {"codec": "exact"}])
def test_what_a_lossy_codec_lost_stays_lost(tmp_path, options):
    packed = write_cache(tmp_path / "packed")
    with pytest.raises(ConfigError, match="cannot bring back"):
        changed(packed, tmp_path, **options)
    assert changed(packed, tmp_path, quality="small").spec.codec.max_kl == pytest.approx((1e-3**0.5 + 1e-2**0.5) ** 2)


def test_errors_of_packing_twice_are_declared(tmp_path):
    """Against what was said at first, not only against what the first packing left of it."""
    plan = make_plan(codec__name="exact", targets__k=32)
    source = write_cache(tmp_path / "source", plan)
    once = changed(source, tmp_path, "once", codec="packed")
    for name, cache, options in (("small", once, {"quality": "small"}), ("fewer", once, {"top_k": 16})):
        twice = changed(cache.store, tmp_path, name, **options)
        before, after = open_cache(source.root), twice
        kl = [divergence(a.targets, b.targets) for a, b in zip(before, after, strict=True)]
        assert 0 < np.concatenate(kl).mean() <= after.spec.codec.max_kl
        assert after.spec.codec.max_kl > once.spec.codec.max_kl
    assert changed(once.store, tmp_path, "copy").spec.codec == once.spec.codec


def test_each_packing_adds_its_own_error(tmp_path):
    """However often it is packed: not what was declared before, once more."""
    cache, each = open_cache(write_cache(tmp_path / "source", make_plan(targets__k=32)).root), 1e-3**0.5
    for number in range(1, 6):
        cache = changed(cache.store, tmp_path, f"cut-{number}", top_k=32 - number)
        assert cache.spec.codec.max_kl == pytest.approx(((number + 1) * each) ** 2)
    same = changed(cache.store, tmp_path, "same", top_k=16, quality="standard")
    assert same.spec.codec.max_kl == pytest.approx((7 * each) ** 2), "as without --quality: no finer than it was"
    small = changed(cache.store, tmp_path, "small", quality="small")
    assert small.spec.codec.max_kl == pytest.approx((6 * each + 0.1) ** 2)
    with pytest.raises(ConfigError, match="cannot bring back"):
        changed(small.store, tmp_path, "finer", quality="standard")


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("k", [8, 64, 100, 128, 1000])
def test_levels_tell_what_they_declare(quality, k):
    codec = describe_codec("packed", quality, k)
    assert error_of_levels(codec) == codec.max_kl
    assert error_of_levels(codec.model_copy(update={"max_kl": 0.5})) == codec.max_kl


def test_packed_too_often_is_refused_before_anything_is_written(tmp_path):
    source = write_cache(tmp_path / "source", make_plan(codec__max_kl=0.5))
    with pytest.raises(ConfigError, match=r"declares an error of 0.5 nats, and packed once more .* of at most 1"):
        changed(source, tmp_path, top_k=4)
    assert not (tmp_path / "new").exists()


def divergence(said, stored):
    """``[N]``, KL over the entries that are stored, and all the rest, at T = 1."""
    kl, first, second = [], 0, 0
    for number, kept in zip(said.num_entries, stored.num_entries, strict=True):
        whole, part = slice(first, first + number), slice(second, second + kept)
        first, second = whole.stop, part.stop
        of_part = np.isin(said.token_ids[whole], stored.token_ids[part])
        assert of_part.sum() == kept
        p, q = np.exp(said.logprobs[whole][of_part].astype(float)), np.exp(stored.logprobs[part].astype(float))
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        kl.append((p * np.log(p / q)).sum())
    return np.array(kl)


def test_draws_cannot_be_thinned(tmp_path):
    plan = make_plan(targets={"scheme": "systematic", "k": 0, "num_draws": 8, "temperatures": [1.0]})
    publish_plan(LocalStore(tmp_path / "drawn"), plan)
    with pytest.raises(ConfigError, match="were drawn"):
        plan_of(Reader(plan), TranscodeOptions(cache="x", output="y", top_k=4))
    with pytest.raises(ConfigError, match=r"--top-p 0.5: entries of a systematic cache were drawn"):
        plan_of(Reader(plan), TranscodeOptions(cache="x", output="y", top_p=0.5))


class Reader:
    """What ``plan_of`` asks of a reader."""

    def __init__(self, plan):
        self.spec, self.store = plan.spec, "x"


def test_other_settings_an_unfinished_source_and_the_cache_itself_are_refused(source, tmp_path):
    changed(source, tmp_path, top_k=3)
    with pytest.raises(CacheMismatchError, match=r"targets\.k: the cache has 3, this run asks for 2"):
        changed(source, tmp_path, top_k=2)
    with pytest.raises(ConfigError, match="is the cache itself"):
        transcode(TranscodeOptions(cache=str(source), output=str(source)))
    unfinished = LocalStore(tmp_path / "unfinished")
    publish_plan(unfinished, EXACT)
    put_shard(unfinished, EXACT, 0)
    with pytest.raises(CacheIncompleteError):
        changed(unfinished, tmp_path, "other")


def test_the_command(source, tmp_path):
    done = kdcache("transcode", "--cache", source, "--output", tmp_path / "new", "--top-k", 2, "--quality", "small", "--codec", "packed")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "in 4 shards" in done.output and "of the mass kept" in done.output
    assert read_plan(LocalStore(tmp_path / "new")).spec.codec.max_kl == 1e-2
    assert list((tmp_path / "new" / "runs").glob("*.provenance.json"))
    missing = kdcache("transcode", "--cache", tmp_path / "nowhere", "--output", tmp_path / "x")
    assert missing.exit_code == 1 and "is not a kdcache cache" in missing.output
    assert kdcache("transcode", "--cache", source).exit_code == 1
    wrong = kdcache("transcode", "--cache", source, "--output", tmp_path / "y", "--temperatures", "1,x")
    assert wrong.exit_code == 1 and "numbers separated by commas" in wrong.output


def test_without_options_it_is_a_copy(tmp_path, source):
    """Byte for byte, plan and commits too."""
    changed(source, tmp_path, "copy")
    after = all_files(tmp_path / "copy")
    assert {name: data for name, data in after.items() if not name.startswith("runs/")} == all_files(source.root)


def test_a_hidden_cache_is_copied_with_its_head(tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "version-1" / "hidden"
    copy = changed(LocalStore(golden), tmp_path, "copy")
    assert copy.head_bytes() == open_cache(golden).head_bytes()
    assert verify_cache(copy.store).intact


def test_a_damaged_shard_is_not_copied(tmp_path, source):
    shard = sorted((source.root / "shards").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheCorruptError, match="shard 00001"):
        changed(source, tmp_path, "copy")
