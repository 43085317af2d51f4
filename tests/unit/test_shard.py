import json

import numpy as np
import pyarrow as pa
import pytest

from kdcache.cache.frames import compress
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import METADATA_KEY, ShardBuilder, ShardReader, content_hash, schema, sequence_id
from kdcache.errors import CacheCorruptError
from kdcache.targets import TokenSequence
from tests.strategies import build_shard, make_plan, make_row, write_cache


def read(data, of=None, shard=1, **changes):
    of = of or make_plan()
    arguments = {
        "plan": of.fingerprint,
        "shard": shard,
        "max_positions": 64,
    }
    return ShardReader(data, of.spec.make_codec(), **{**arguments, **changes})


def rebuilt(change, **options):
    """The bytes of shard 1 with its columns changed by a function, digest and all."""
    batch = pa.ipc.open_file(pa.py_buffer(build_shard(make_plan(), 1)[0])).get_batch(0)
    columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
    change(columns)
    schema_ = pa.schema(
        [pa.field(n, c.type, nullable=False) for n, c in columns.items()], metadata=batch.schema.metadata
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema_, **options) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema_))
    return sink.getvalue()


def set_frame(name, content, row=0):
    def change(columns):
        frames = columns[name].to_pylist()
        frames[row] = compress(content)
        columns[name] = pa.array(frames, columns[name].type)

    return change


def set_number(name, value, row=0):
    def change(columns):
        numbers = columns[name].to_pylist()
        numbers[row] = value
        columns[name] = pa.array(numbers, columns[name].type)

    return change


@pytest.mark.parametrize("codec", ["exact", "packed"])
def test_rows_come_back(codec):
    plan = make_plan(codec__name=codec)
    reader = read(build_shard(plan, 1)[0], plan)
    assert len(reader) == 3
    for row in (2, 0, 1):
        sequence, targets = make_row(plan, 3 + row)
        found = reader.sequence(row)
        for name in ("input_ids", "loss_mask", "document_starts"):
            assert (getattr(found, name) == getattr(sequence, name)).all()
        compact = reader.targets(row, found)
        assert (compact.token_ids == targets.token_ids).all()
        if codec == "exact":
            assert (compact.values == targets.logprobs).all()
        assert reader.sequence_id(row) == sequence_id(1, row) == (1 << 32) + row


def test_a_shard_is_a_pure_function():
    plan = make_plan()
    assert bytes(build_shard(plan, 2)[0]) == bytes(build_shard(plan, 2)[0])
    assert bytes(build_shard(plan, 2)[0]) != bytes(build_shard(plan, 1)[0])


def test_any_arrow_reader_opens_it():
    plan = make_plan()
    table = pa.ipc.open_file(pa.py_buffer(build_shard(plan, 1)[0])).read_all()
    assert table.num_rows == 3
    about = json.loads(table.schema.metadata[METADATA_KEY])
    assert about == {"format_version": 1, "plan": plan.fingerprint, "shard": 1}


def test_an_empty_shard():
    plan = make_plan()
    data = ShardBuilder(plan.spec.make_codec(), plan.fingerprint, 1).finish()
    assert len(read(data)) == 0


@pytest.mark.parametrize("vocab_size", [300, 65_536, 65_537, 1 << 20])
def test_token_ids_of_any_width(vocab_size):
    plan = make_plan(teacher__vocab_size=vocab_size)
    codec = plan.spec.make_codec()
    _, targets = make_row(make_plan(), 0)
    ids = np.full(9, vocab_size - 1, np.uint32)
    sequence = TokenSequence(ids, np.zeros(9, bool), np.array([0, 4], np.uint32))
    builder = ShardBuilder(codec, plan.fingerprint, 1)
    nothing = type(targets)(
        targets.temperatures, *(np.zeros(0, t) for t in ("u4", "u4", "f4")), np.zeros((0, 2), "f4"),
        *(np.zeros(0, "f4") for _ in range(3)),
    )  # fmt: skip
    builder.add(sequence, nothing)
    assert (read(builder.finish(), plan).sequence(0).input_ids == ids).all()


def test_one_target_for_each_label():
    plan = make_plan()
    builder = ShardBuilder(plan.spec.make_codec(), plan.fingerprint, 0)
    sequence, _ = make_row(plan, 0)
    _, others = next(
        row for row in (make_row(plan, i) for i in range(1, 9)) if len(row[1]) != sequence.target_mask.sum()
    )
    with pytest.raises(ValueError, match="one target"):
        builder.add(sequence, others)


def test_content_hash_tells_ids_mask_and_documents_apart():
    base = TokenSequence(np.arange(8, dtype=np.uint32), np.zeros(8, bool), np.array([0], np.uint32))
    mask = np.arange(8) == 3
    others = [
        TokenSequence(base.input_ids[::-1].copy(), base.loss_mask, base.document_starts),
        TokenSequence(base.input_ids, mask, base.document_starts),
        TokenSequence(base.input_ids, base.loss_mask, np.array([0, 4], np.uint32)),
    ]
    assert len({content_hash(s) for s in [base, *others]}) == 4
    again = TokenSequence(base.input_ids.copy(), base.loss_mask.copy(), base.document_starts.copy())
    assert content_hash(again) == content_hash(base)


def test_digest_mismatch_names_the_shard(tmp_path):
    (path,) = (write_cache(tmp_path).root / "shards").glob("00001-*")
    data, committed = bytearray(path.read_bytes()), path.stem.partition("-")[2]
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheCorruptError, match=f"shard 00001: digest {committed} was committed") as caught:
        open_cache(tmp_path).open_shard(1)
    assert "verify" in caught.value.hint


def test_a_shard_of_another_number_or_plan():
    data = build_shard(make_plan(), 1)[0]
    for wrong in ({"shard": 2}, {"plan": "f" * 32}):
        with pytest.raises(CacheCorruptError, match="schema or origin differ"):
            read(data, **wrong)


def test_a_shard_of_another_codec():
    with pytest.raises(CacheCorruptError, match="schema or origin differ"):
        read(build_shard(make_plan(), 1)[0], make_plan(codec__name="exact"), plan=make_plan().fingerprint)


def test_longer_than_the_plan_allows():
    reader = read(build_shard(make_plan(), 1)[0], max_positions=1)
    with pytest.raises(CacheCorruptError, match="shard 00001, sequence 0: .* positions, the plan allows 1 to 1"):
        reader.sequence(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_number("num_positions", 0), "0 positions"),
        (set_number("num_positions", 2**32 - 1), "positions, the plan allows"),
        (set_number("num_positions", 3), "input_ids"),
        (set_number("content_hash", 1), "content hash"),
        (set_frame("document_starts", np.array([], "u4")), "document starts"),
        (set_frame("document_starts", np.array([1], "u4")), "document starts"),
        (set_frame("document_starts", np.array([0, 0], "u4")), "document starts"),
        (set_frame("document_starts", np.array([0, 60], "u4")), "document starts"),
        (set_frame("document_starts", bytes(1 << 20)), "document_starts"),
        (set_frame("loss_mask", bytes([255] * 100)), "loss_mask"),
        (set_frame("input_ids", bytes(64 << 20)), "input_ids: a frame of at most"),
    ],
)
def test_hostile_rows(change, message):
    """The digest holds: whoever wrote the shard wrote the commit too. Each is refused by name, none is a crash."""
    with pytest.raises(CacheCorruptError, match=message):
        read(rebuilt(change)).sequence(0)


def test_a_loss_bit_at_the_start_of_a_document():
    count = len(make_row(make_plan(), 3)[0])
    bits = np.packbits(np.ones(count, bool))
    with pytest.raises(CacheCorruptError, match="loss bit at the start"):
        read(rebuilt(set_frame("loss_mask", bits))).sequence(0)


def test_token_ids_beyond_the_vocabulary():
    count = len(make_row(make_plan(), 3)[0])
    with pytest.raises(CacheCorruptError, match="token id 300 in a vocabulary of 300"):
        read(rebuilt(set_frame("input_ids", np.full(count, 300, "<u2")))).sequence(0)


def bad_offsets(columns):
    column = columns["input_ids"]
    data = column.buffers()[2]
    offsets = np.array([0, 1 << 40, 30, data.size], np.int64)
    columns["input_ids"] = pa.Array.from_buffers(column.type, 3, [None, pa.py_buffer(offsets.tobytes()), data])


def missing_value(columns):
    columns["num_positions"] = pa.array([None, 5, 5], pa.uint32())


def extra_column(columns):
    columns["extra"] = columns["num_positions"]


def other_type(columns):
    columns["num_positions"] = columns["num_positions"].cast(pa.uint64())


@pytest.mark.parametrize("change", [bad_offsets, missing_value, extra_column, other_type])
def test_hostile_arrow(change):
    with pytest.raises(CacheCorruptError, match="shard 00001"):
        read(rebuilt(change))


def test_more_than_one_batch():
    batch = pa.ipc.open_file(pa.py_buffer(build_shard(make_plan(), 1)[0])).get_batch(0)
    for count in (0, 2):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            for _ in range(count):
                writer.write_batch(batch)
        with pytest.raises(CacheCorruptError, match=f"one record batch was expected, found {count}"):
            read(sink.getvalue())


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_body_is_refused_before_it_is_unpacked(codec):
    """A few KB that say they become gigabytes."""

    def bomb(columns):
        columns["input_ids"] = pa.array([bytes(64 << 20)] * 3, pa.large_binary())

    data = rebuilt(bomb, options=pa.ipc.IpcWriteOptions(compression=codec))
    assert data.size < 2_000_000
    held = pa.total_allocated_bytes()
    with pytest.raises(CacheCorruptError, match="a plain record batch was expected"):
        read(data)
    assert pa.total_allocated_bytes() <= held
    pool = pa.default_memory_pool()
    assert pool.max_memory() < 1 << 30


def with_metadata(of_schema, of_batch):
    batch = pa.ipc.open_file(pa.py_buffer(build_shard(make_plan(), 1)[0])).get_batch(0)
    schema_ = batch.schema.with_metadata(dict(batch.schema.metadata) | of_schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema_) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema_.metadata), custom_metadata=of_batch or None)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("of_schema", "of_batch", "message"),
    [
        ({}, {"ARROW:experimental_compression": "zstd"}, "plain record batch"),
        ({}, {"a": "b"}, "plain record batch"),
        ({}, {"a": "b" * 10_000}, "metadata of at most"),
        ({"a": "b"}, {}, "schema or origin differ"),
        ({"a": "b" * 10_000}, {}, "metadata of at most"),
    ],
)
def test_metadata_of_strangers(of_schema, of_batch, message):
    """A table of offsets may name one long string as often as it likes: metadata are small, or Arrow does not see them."""
    with pytest.raises(CacheCorruptError, match=message):
        read(with_metadata(of_schema, of_batch))


def test_dictionaries_are_refused():
    def dictionary(columns):
        columns["num_positions"] = pa.array([1, 2, 3], pa.uint32()).dictionary_encode()

    with pytest.raises(CacheCorruptError, match="shard 00001"):
        read(rebuilt(dictionary))


def test_every_byte_of_metadata_may_be_changed():
    """By someone who signs it: refused, or the same rows."""
    whole = bytes(build_shard(make_plan(), 1)[0])
    sound = read(whole).content_hashes().tolist()
    rng = np.random.default_rng(0)
    for place in [*range(3000), *range(len(whole) - 200, len(whole))]:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        try:
            reader = read(bytes(data))
        except CacheCorruptError:
            continue
        assert len(reader.content_hashes()) == len(reader) <= len(whole)
        if place < 8:
            assert reader.content_hashes().tolist() == sound


@pytest.mark.parametrize("junk", [b"x", b"ARROW1", b"ARROW1\0\0" + bytes(200), bytes(1000)])
def test_not_an_arrow_file(junk):
    with pytest.raises(CacheCorruptError, match="shard 00001"):
        read(junk)


def test_schema_lists_every_column_of_the_codec():
    plan = make_plan()
    codec = plan.spec.make_codec()
    names = schema(codec, plan.fingerprint, 0).names
    assert set(codec.column_names) < set(names) and len(set(names)) == len(names)
