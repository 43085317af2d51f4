import dataclasses

import numpy as np
import pytest

from kdcache.cache import packed
from kdcache.cache.codec import Codec
from kdcache.cache.compact import bfloat16_to_float, float_to_bfloat16
from kdcache.cache.frames import compress, read_array
from kdcache.cache.packed import GAP_ESCAPE
from kdcache.cache.quality import QUALITIES, describe_codec
from kdcache.errors import CacheCorruptError, ConfigError, TeacherOutputError
from kdcache.targets import kl_of_stored
from tests.strategies import frequencies_of, log_softmax, targets_from_logits, zipf_logits

pytestmark = pytest.mark.usefixtures("codec_form")

FIELDS = ("num_entries", "token_ids", "logprobs", "tail_logprobs", "logz", "label_logprobs", "entropy")


def through(codec, targets):
    return codec.decode(codec.encode(targets), len(targets), "shard 00003, sequence 1").expand(targets.temperatures)


def example(name="packed", n=5, vocab_size=300, k=8, **codec):
    rng = np.random.default_rng(7)
    targets = targets_from_logits(zipf_logits(rng, n, vocab_size), rng.integers(0, vocab_size, n), k)
    return Codec(name, vocab_size, targets.temperatures, k, **codec), targets


def changed(targets, **fields):
    return dataclasses.replace(targets, **fields)


def test_exact_is_bit_for_bit():
    codec, targets = example("exact")
    out = through(codec, targets)
    for name in FIELDS:
        assert getattr(out, name).tobytes() == getattr(targets, name).tobytes(), name


def mean_kl(targets, decoded, temperature=1.0):
    """KL(exact || decoded) over K + 1 buckets, float64, the plain form."""
    p, q = (np.split(x.at_temperature(temperature)[0].astype(float), x.offsets[1:-1]) for x in (targets, decoded))
    p_tail, q_tail = (x.tail_at(temperature).astype(float) for x in (targets, decoded))
    heads = [(np.exp(a) * (a - b)).sum() for a, b in zip(p, q, strict=True)]
    tails = [np.exp(a) * (a - b) if a > -np.inf else 0.0 for a, b in zip(p_tail, q_tail, strict=True)]
    return np.mean(np.add(heads, tails))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_of_stored_equals_the_plain_form(temperature):
    codec, targets = example(n=30)
    targets.tail_logprobs[3] = -np.inf
    stored = through(codec, targets)
    kl = kl_of_stored(targets, stored, temperature)
    assert kl.shape == (30,)
    assert kl.mean() == pytest.approx(mean_kl(targets, stored, temperature), rel=1e-9)
    assert kl_of_stored(targets, targets).max() == 0


@pytest.mark.parametrize("k", [16, 64, 128, 256])
@pytest.mark.parametrize("name", sorted(QUALITIES))
def test_each_quality_keeps_what_it_declares(name, k):
    rng = np.random.default_rng(3)
    logits = zipf_logits(rng, 64, 20_000)
    targets = targets_from_logits(logits, rng.integers(0, 20_000, 64), k)
    quality = QUALITIES[name].for_entries(k)
    codec = Codec("packed", 20_000, targets.temperatures, k, levels=quality.levels)
    stored = through(codec, targets)
    assert quality.max_kl / 100 < mean_kl(targets, stored) < quality.max_kl
    error = np.abs(stored.logprobs - targets.logprobs)
    assert (error <= codec.logprob_error_bound(targets.logprobs)).all()
    first, mine = (x.logprobs.reshape(64, k).argmax(1) for x in (targets, stored))
    assert (first == mine).all()


@pytest.mark.parametrize("name", sorted(QUALITIES))
def test_the_nearest_level_is_the_nearest_to_a_cell_of_the_grid(name):
    levels = QUALITIES[name].levels
    middles = (levels.table[1:] + levels.table[:-1]) / 2
    rng = np.random.default_rng(0)
    depths = np.concatenate([
        rng.uniform(0, levels.table[-1], 20_000).astype("f4"), levels.table, middles, np.nextafter(middles, np.float32(0)),
        np.nextafter(middles, np.float32(1e9)), [-1e-4, 0, levels.table[-1] + 5],
    ]).astype(np.float32)  # fmt: skip
    found, best = (
        np.abs(levels.table[codes] - depths) for codes in (levels.nearest(depths), packed.nearest(levels.table, depths))
    )
    assert (found <= best + 1.001 / packed.GRID_CELLS).all()
    assert levels.step / 10 > 1 / packed.GRID_CELLS


@pytest.mark.parametrize("counts", [[3, 3, 3], [3, 0, 5, 1], [0, 0], [], [1, 1, 1, 90, 1], [70_000, 1]])
def test_column_order_there_and_back(counts):
    order = packed.ColumnOrder(np.array(counts, np.uint32))
    entries = np.arange(sum(counts))
    columns = order.to_columns(entries)
    assert (order.to_rows(columns) == entries).all()
    rank = np.concatenate([np.arange(count) for count in counts] or [entries])
    assert (np.diff(rank[columns]) >= 0).all()
    ids = np.cumsum(1 + entries % 7) if len(entries) else entries  # ascending everywhere, so inside each position
    gaps = order.columns_of_gaps(ids.astype(np.uint32))
    assert (gaps == order.to_columns(packed.id_gaps(ids.astype(np.uint32), np.array(counts, np.uint32)))).all()
    for stored in (gaps.astype(np.int64), gaps.astype(np.uint16)):
        if (stored == gaps).all():
            assert (order.ids_of_gaps(stored) == ids).all()


@pytest.mark.parametrize("num_entries", [[4, 0, 9, 1], [0, 0], [128, 3], []])
def test_small_ids_as_bits_there_and_back(num_entries):
    """Against a matrix of which id is there; ids on both sides of the border, and a position that has only small ones."""
    rng = np.random.default_rng(1)
    ids = [np.sort(rng.choice(300 if k < 128 else 128, k, replace=False)) for k in num_entries]
    token_ids, counts = np.concatenate([[], *ids]).astype(np.uint32), np.array(num_entries, np.uint32)
    bits, rest, num_rest = packed.split_ids(token_ids, counts)
    there = np.zeros((len(ids), packed.NUM_BITS), bool)
    for row, some in enumerate(ids):
        there[row, some[some < packed.NUM_BITS]] = True
    assert (bits == np.packbits(there, axis=1).T).all()
    assert (rest == np.concatenate([[], *(some[some >= packed.NUM_BITS] - packed.NUM_BITS for some in ids)])).all()
    num_few = packed.num_bits_set(bits.ravel(), len(ids))
    assert (num_few + num_rest == counts).all()
    assert (packed.join_ids(bits.ravel(), rest, num_few, num_rest) == token_ids).all()


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000])
def test_counts_as_half_bytes_there_and_back(size):
    counts = np.random.default_rng(size).integers(0, 40, size).astype(np.uint16)
    pairs, beyond = packed.encode_counts(counts)
    assert len(pairs) == (size + 1) // 2
    assert (beyond == counts[counts >= packed.COUNT_ESCAPE] - packed.COUNT_ESCAPE).all()
    found, num_large = packed.decode_counts(pairs, beyond.astype(np.uint8), size)
    assert (found == counts).all() and num_large == len(beyond)
    assert packed.decode_counts(pairs, np.zeros(len(beyond) + 1, np.uint8), size)[1] == len(beyond)


def drawn_example(num_draws, name="packed"):
    rng = np.random.default_rng(2)
    drawn = np.minimum(rng.geometric(0.2, (30, num_draws)), 299)
    targets = frequencies_of(drawn, 2.0)
    return Codec(name, 300, (1.0,), num_draws, num_draws=num_draws, frequencies=True), targets


@pytest.mark.parametrize("name", ["packed", "exact"])
@pytest.mark.parametrize("num_draws", [1, 20, 300])
def test_frequencies_are_exact(name, num_draws):
    codec, targets = drawn_example(num_draws, name)
    frames = codec.encode(targets)
    assert not {"levels", "logprobs", "tails", "logz"} & set(frames)
    out = codec.decode(frames, len(targets), "here").expand((1.0,))
    assert out.estimator == "frequencies"
    np.testing.assert_array_equal(out.counts, targets.counts)
    np.testing.assert_array_equal(out.token_ids, targets.token_ids)
    np.testing.assert_allclose(out.logprobs, targets.logprobs, atol=1e-6)
    assert np.isneginf(out.tail_logprobs).all()


def test_logprobs_cannot_be_made_of_frequencies():
    codec, targets = drawn_example(20)
    with pytest.raises(ValueError, match="not known"):
        dataclasses.replace(codec, frequencies=False).encode(targets)


@pytest.mark.parametrize(
    ("column", "content", "message"),
    [
        ("counts", lambda old: np.zeros_like(old), "20 draws at each position"),
        ("counts", lambda old: np.full_like(old, 0xFF), "count_escapes"),
        ("counts", lambda old: old[:-1], "counts: "),
        ("counts", lambda old: np.full_like(old, 0xEE), "20 draws at each position"),
    ],
)
def test_counts_that_cannot_be_are_refused(column, content, message):
    codec, targets = drawn_example(20)
    frames = codec.encode(targets)
    pairs = (len(targets.token_ids) + 1) // 2
    frames[column] = compress(content(read_array(frames[column], np.uint8, what="x", count=pairs)))
    with pytest.raises(CacheCorruptError, match=message):
        codec.decode(frames, len(targets), "here")


@pytest.mark.parametrize("name", sorted(QUALITIES))
def test_every_quality_holds_a_whole_vocabulary(name):
    """However many entries: steps stay above the finest that a plan may name."""
    vocab_size = 60_000
    targets = targets_from_logits(zipf_logits(np.random.default_rng(0), 3, vocab_size), np.zeros(3, int), vocab_size)
    quality = QUALITIES[name].for_entries(vocab_size)
    assert quality.levels.step >= 1 / 128
    codec = Codec("packed", vocab_size, targets.temperatures, vocab_size, levels=quality.levels)
    stored = through(codec, targets)
    assert mean_kl(targets, stored) < quality.max_kl
    assert describe_codec("packed", name, 1 << 32).step >= 1 / 128


def test_finer_qualities_take_more_bytes():
    rng = np.random.default_rng(3)
    targets = targets_from_logits(zipf_logits(rng, 64, 5000), rng.integers(0, 5000, 64), 64)
    sizes = [
        sum(map(len, Codec("packed", 5000, targets.temperatures, 64, levels=QUALITIES[name].levels).encode(targets).values()))
        for name in ("small", "standard", "high")
    ]  # fmt: skip
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_packed_keeps_what_the_teacher_said(temperature):
    rng = np.random.default_rng(11)
    vocab_size, k, n = 49_152, 64, 64
    logits = zipf_logits(rng, n, vocab_size)
    targets = targets_from_logits(logits, rng.integers(0, vocab_size, n), k)
    decoded = through(Codec("packed", vocab_size, targets.temperatures, k), targets)
    assert 0 <= mean_kl(targets, decoded, temperature) < 1e-3


def test_packed_top_1_is_kept_at_every_position():
    rng = np.random.default_rng(5)
    logits = zipf_logits(rng, 200, 2000)
    best = logits.argmax(1)
    for gap in (0.0, 1e-4, 1e-2):  # rivals so close that they share the level of the first choice
        rival = (best + 1) % 2000
        logits[np.arange(200), rival] = logits.max(1) - gap
        targets = targets_from_logits(logits, best, 32)
        decoded = through(Codec("packed", 2000, targets.temperatures, 32), targets)
        first, mine = (x.logprobs.reshape(200, 32).argmax(1) for x in (targets, decoded))
        assert (first == mine).all()


@pytest.mark.parametrize("vocab_size", [49_152, 152_064, 1 << 20])
def test_a_teacher_that_knows_nothing(vocab_size):
    """Flat logits: the tail is nearly everything, and still within the declared error."""
    logits = np.random.default_rng(0).normal(size=(3, vocab_size)) * 0.02
    targets = targets_from_logits(logits, np.zeros(3, int), 4)
    codec = Codec("packed", vocab_size, targets.temperatures, 4)
    decoded = through(codec, targets)
    error = np.abs(decoded.logprobs - targets.logprobs)
    assert (error <= codec.logprob_error_bound(targets.logprobs)).all()
    assert mean_kl(targets, decoded) < 1e-4


def test_error_bound_holds_for_heads_made_to_break_it():
    rng = np.random.default_rng(2)
    for k in (2, 8, 64, 512):
        n = 40_000 // k
        tail = rng.choice([1e-30, 1e-3, 0.5, 0.99, 0.9999], size=n)
        three = -rng.uniform(0, 12, size=(n, 3))
        which = rng.integers(0, 3, size=(n, k))
        which[::2], which[:, 0] = 2, 0  # one entry, and many that share a rounding error
        logp = log_softmax(np.take_along_axis(three, which, 1)) + np.log1p(-tail)[:, None]
        base = targets_from_logits(np.zeros((n, k)), np.zeros(n, int), k, temperatures=(1.0,))
        targets = changed(
            base, logprobs=logp.ravel().astype(np.float32), tail_logprobs=np.log(tail)[:, None].astype("f4")
        )
        codec = Codec("packed", k, (1.0,), k)
        error = np.abs(through(codec, targets).logprobs - targets.logprobs)
        assert (error <= codec.logprob_error_bound(targets.logprobs)).all()


def test_error_bound_grows_toward_the_tail_and_stays_useful():
    codec, _ = example(k=64)
    bound = codec.logprob_error_bound(np.array([0, -1, -5, -20], np.float32))
    assert (np.diff(bound) > 0).all()
    assert bound[0] < 0.5 and bound[-1] < 2.5


@pytest.mark.parametrize("vocab_size", [131_073, 152_064, 256_000, 1 << 20, 1 << 32])
@pytest.mark.parametrize("name", ["exact", "packed"])
def test_id_width(name, vocab_size):
    rows = [[0, 65_535, 65_536, vocab_size - 1], [vocab_size - 1], [], [0], [59, 60, 119, 120, 180, 50_000, 120_000]]
    counts = np.array([len(row) for row in rows], np.uint32)
    n, total = len(rows), int(counts.sum())
    base = targets_from_logits(np.zeros((n, 9)), np.zeros(n, int), 1)
    targets = changed(
        base,
        num_entries=counts,
        token_ids=np.concatenate([np.array(row, np.int64) for row in rows]).astype(np.uint32),
        logprobs=np.full(total, -6, np.float32),
    )
    codec = Codec(name, vocab_size, targets.temperatures, 7)
    assert (through(codec, targets).token_ids == targets.token_ids).all()


def test_gaps_at_every_border_of_the_symbols():
    gaps = np.array([0, 59, 60, 61, 60 + 255, 60 + 256, 60 + 194 * 256 + 255, 60 + 195 * 256, 60 + 195 * 256 + 1])
    ids = np.cumsum(gaps + 1) - 1
    vocab_size = int(ids.max()) + 1
    base = targets_from_logits(np.zeros((1, 9)), np.zeros(1, int), 9)
    targets = changed(base, token_ids=ids.astype(np.uint32))
    codec = Codec("packed", vocab_size, targets.temperatures, 9)
    assert (through(codec, targets).token_ids == ids).all()


@pytest.mark.parametrize("name", ["exact", "packed"])
def test_no_positions_and_no_entries(name):
    for n, k in ((0, 4), (3, 0)):
        targets = targets_from_logits(np.zeros((n, 9)), np.zeros(n, int), k)
        out = through(Codec(name, 9, targets.temperatures, 4), targets)
        assert out.num_entries.tolist() == [k] * n and len(out.logprobs) == 0
        np.testing.assert_allclose(np.exp(out.tail_logprobs), 1, atol=1e-5)


def test_packed_scalars_are_close():
    codec, targets = example(n=50)
    out = through(codec, targets)
    assert np.abs(out.logz - targets.logz).max() <= packed.LOGZ_STEP / 2
    assert np.abs(out.entropy - targets.entropy).max() <= packed.ENTROPY_STEP / 2
    assert (
        np.abs(out.label_logprobs - targets.label_logprobs) <= codec.logprob_error_bound(targets.label_logprobs)
    ).all()


def test_packed_tails_are_close_at_every_temperature():
    codec, targets = example(n=50)
    out = through(codec, targets)
    for temperature in targets.temperatures:
        true, mine = (np.exp(x.tail_at(temperature), dtype=float) for x in (targets, out))
        odds = np.log(true / (1 - true)) - np.log(mine / (1 - mine))
        assert np.abs(odds[true > 1e-5]).max() <= 1 / 8 + 1e-4


@pytest.mark.parametrize("name", ["exact", "packed"])
def test_column_names_are_those_of_encode(name):
    codec, targets = example(name)
    assert tuple(codec.encode(targets)) == codec.column_names


def test_column_names_with_hidden_states():
    codec, targets = example("exact", hidden_size=4)
    targets = changed(targets, hidden=np.ones((5, 4), np.float32))
    assert tuple(codec.encode(targets)) == codec.column_names


def test_hidden_states_are_bit_for_bit():
    rng = np.random.default_rng(0)
    codec, targets = example("exact", hidden_size=16)
    targets = changed(targets, hidden=rng.normal(size=(5, 16)).astype(np.float32))
    assert through(codec, targets).hidden.tobytes() == targets.hidden.tobytes()
    rounded = (targets.hidden.view(np.uint32) & 0xFFFF0000).view(np.float32)
    codec = dataclasses.replace(codec, hidden_dtype="bfloat16")
    assert (through(codec, changed(targets, hidden=rounded)).hidden == rounded).all()


def test_bfloat16_bits():
    values = np.array([1.0, -2.5, 0.0, 3e38, np.inf], np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert (bfloat16_to_float(float_to_bfloat16(values)) == values).all()
    with pytest.raises(AssertionError):
        float_to_bfloat16(np.array([1.0001], np.float32))


def test_packed_refuses_what_its_levels_cannot_hold():
    codec, targets = example()
    targets.logprobs[3] = -300
    with pytest.raises(ConfigError, match=r"holds logprobs down to -2\d\d nats, found -300") as caught:
        codec.encode(targets)
    assert "--codec exact" in caught.value.hint


def test_packed_refuses_a_log_normaliser_past_16_bits():
    codec, targets = example()
    targets.logz[0] = 1e5
    with pytest.raises(ConfigError, match="up to 4095, found 100000"):
        codec.encode(targets)


def test_packed_log_normalisers_and_entropies_are_close():
    codec, targets = example(n=4)
    targets.logz[:] = [-4095, -0.07, 17.3, 4095]
    targets.entropy[:] = [0, 0.3, 5.01, 22.2]
    out = through(codec, targets)
    np.testing.assert_array_equal(out.logz, [-4095, -0.125, 17.25, 4095])
    np.testing.assert_array_equal(out.entropy, [0, 0.25, 5, 22.25])


@pytest.mark.parametrize("name", ["exact", "packed"])
@pytest.mark.parametrize("field", ["logprobs", "label_logprobs", "logz", "entropy", "tail_logprobs"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused_by_the_writer(name, field, value):
    codec, targets = example(name)
    getattr(targets, field)[-1] = value
    with pytest.raises(TeacherOutputError):
        codec.encode(targets)


@pytest.mark.parametrize("name", ["exact", "packed"])
def test_minus_inf_entry_is_refused_by_the_writer(name):
    codec, targets = example(name)
    targets.logprobs[0] = -np.inf
    with pytest.raises((TeacherOutputError, ConfigError)):
        codec.encode(targets)


@pytest.mark.parametrize("name", ["exact", "packed"])
def test_the_writer_refuses_what_no_reader_would_accept(name):
    codec, targets = example(name)
    with pytest.raises(ValueError, match="temperatures"):
        dataclasses.replace(codec, temperatures=(1.0,)).encode(targets)
    with pytest.raises(ValueError, match="vocabulary"):
        dataclasses.replace(codec, vocab_size=int(targets.token_ids.max())).encode(targets)
    with pytest.raises(ValueError, match="8 entries"):
        dataclasses.replace(codec, max_entries=7).encode(targets)


@pytest.mark.parametrize("name", ["exact", "packed"])
def test_ids_beyond_the_vocabulary(name):
    codec, targets = example(name)
    frames = codec.encode(targets)
    smaller = dataclasses.replace(codec, vocab_size=int(targets.token_ids.max()))
    with pytest.raises(CacheCorruptError, match="shard 00003, sequence 1: .*token id"):
        smaller.decode(frames, 5, "shard 00003, sequence 1")


@pytest.mark.parametrize("name", ["exact", "packed"])
def test_more_entries_than_planned(name):
    codec, targets = example(name)
    with pytest.raises(CacheCorruptError, match="8 entries at a position, the plan allows 7"):
        dataclasses.replace(codec, max_entries=7).decode(codec.encode(targets), 5, "x")


@pytest.mark.parametrize("name", ["exact", "packed"])
def test_missing_column_and_wrong_count(name):
    codec, targets = example(name)
    frames = codec.encode(targets)
    for column in codec.column_names:
        rest = {key: value for key, value in frames.items() if key != column}
        with pytest.raises(CacheCorruptError, match=f"column '{column}' is missing"):
            codec.decode(rest, 5, "x")
    for n in (4, 6):
        with pytest.raises(CacheCorruptError):
            codec.decode(frames, n, "x")


@pytest.mark.parametrize("field", ["logprobs", "label_logprobs", "logz", "entropy", "tails"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused_by_the_reader(field, value):
    codec, targets = example("exact")
    frames = codec.encode(targets)
    array = {"tails": targets.tail_logprobs}.get(field, getattr(targets, field, None)).copy()
    array.flat[-1] = value
    with pytest.raises(CacheCorruptError):
        codec.decode({**frames, field: compress(array)}, 5, "x")


@pytest.mark.parametrize(
    "ids", [[3, 3, 5, 9, 11, 40], [3, 5, 5, 9, 11, 40], [3, 2, 5, 9, 11, 40], [3, 5, 6, 41, 11, 40]]
)
def test_exact_ids_that_do_not_ascend_are_refused_by_the_reader(ids):
    """Three, none, two and one at a position; a larger id may be followed by a smaller one of the next."""
    counts = np.array([3, 0, 2, 1], np.uint32)
    base = targets_from_logits(np.zeros((4, 50)), np.zeros(4, int), 1)
    targets = changed(
        base,
        num_entries=counts,
        token_ids=np.array([3, 5, 9, 2, 40, 11], np.uint32),
        logprobs=np.full(6, -9, np.float32),
    )
    codec = Codec("exact", 50, targets.temperatures, 3)
    frames = codec.encode(targets)
    assert (codec.decode(frames, 4, "x").token_ids == targets.token_ids).all()
    with pytest.raises(CacheCorruptError, match="token_ids: ids that do not ascend"):
        codec.decode(frames | {"token_ids": compress(np.array(ids, "<u4"))}, 4, "shard 00000, sequence 1")


def test_exact_masses_above_one_are_refused():
    targets = targets_from_logits(np.zeros((3, 50)), np.zeros(3, int), 4)
    codec = Codec("exact", 50, targets.temperatures, 4)
    frames = codec.encode(changed(targets, logprobs=np.repeat(np.float32([-9, -1, -9]), 4)))
    with pytest.raises(CacheCorruptError, match="have mass 2.39"):
        codec.decode(frames, 3, "x").expand(codec.temperatures)


def test_an_exact_tail_above_nothing_leaves_nothing():
    """Rounding may lift it above 0, whose ``log(1 - exp(tail))`` is no number."""
    targets = targets_from_logits(np.zeros((3, 50)), np.zeros(3, int), 4)
    codec = Codec("exact", 50, targets.temperatures, 4)
    frames = codec.encode(changed(targets, tail_logprobs=np.full((3, len(codec.temperatures)), 9e-5, np.float32)))
    assert (codec.decode(frames, 3, "x").tails == 0).all()


@pytest.mark.parametrize("name", ["exact", "packed"])
def test_more_entries_than_a_sequence_has(name, monkeypatch):
    targets = targets_from_logits(np.zeros((3, 50)), np.zeros(3, int), 4)
    codec = Codec(name, 50, targets.temperatures, 4)
    frames = codec.encode(targets)
    monkeypatch.setattr("kdcache.cache.columns.MAX_ENTRIES", 11)
    with pytest.raises(CacheCorruptError, match="12 entries, a sequence has at most 11"):
        codec.decode(frames, 3, "x")
    with pytest.raises(ConfigError, match="at most 11 entries, found 12"):
        codec.encode(targets)


def test_packed_frames_that_cannot_have_been_written():
    codec, targets = example("packed")
    frames = codec.encode(targets)
    total = len(targets.token_ids)
    broken = {
        "lowest_level": np.zeros(5, np.uint8),  # levels below zero
        "logz": np.full(9, 1, np.uint8),  # half a number
        "id_symbols": np.full(total, GAP_ESCAPE, np.uint8),  # escapes that are not there
        "num_entries": np.full(5, 7, np.uint8),  # entries that are not there
    }
    for name, array in broken.items():
        with pytest.raises(CacheCorruptError, match="shard 00003"):
            codec.decode({**frames, name: compress(array)}, 5, "shard 00003")


def test_packed_ids_past_32_bits():
    codec = Codec("packed", 1 << 32, (1.0, 2.0, 4.0), 8)
    _, targets = example()
    frames = codec.encode(targets)
    total = len(targets.token_ids)
    frames |= {
        "id_symbols": compress(np.full(total, GAP_ESCAPE, np.uint8)),
        "id_low": compress(b""),
        "id_escapes": compress(np.full(total, 2**32 - 1, np.uint32)),
    }
    with pytest.raises(CacheCorruptError, match="token ids past"):
        codec.decode(frames, 5, "x")


def test_tables_are_what_expand_uses():
    codec, targets = example()
    compact = codec.decode(codec.encode(targets), 5, "x")
    values, tails = codec.tables()
    assert (values == compact.value_table).all() and (tails == compact.tail_table).all()
    assert (np.diff(values) < 0).all() and values[0] == 0
    assert tails.shape == (3, 256) and np.isneginf(tails[:, 0]).all() and (np.diff(tails, axis=1) > 0).all()
    assert Codec("exact", 9, (1.0,), 2).tables() == (None, None)


def test_encoding_is_deterministic():
    codec, targets = example()
    assert codec.encode(targets) == codec.encode(targets)
