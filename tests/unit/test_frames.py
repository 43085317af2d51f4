import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.frames import compress, decompress, read_array
from kdcache.errors import CacheCorruptError, ConfigError


@given(st.binary(max_size=5000))
def test_round_trip(data):
    assert decompress(compress(data), max_bytes=len(data), what="x") == data
    assert decompress(memoryview(compress(memoryview(data))), max_bytes=len(data), what="x") == data


@given(st.binary(max_size=5000), st.integers(1, 2000))
def test_round_trip_in_blocks(data, block_bytes):
    frame = compress(data, block_bytes=block_bytes)
    assert decompress(frame, max_bytes=len(data), what="x") == data
    parameters = zstandard.get_frame_parameters(frame)
    assert parameters.content_size == len(data) and parameters.has_checksum


def test_blocks_help_where_the_content_changes_along_the_way():
    rng = np.random.default_rng(0)
    changing = np.concatenate([rng.integers(64 * i, 64 * i + 16, 8000) for i in range(4)]).astype(np.uint8)
    assert len(compress(changing, block_bytes=8000)) < 0.8 * len(compress(changing))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_arrays_round_trip(dtype):
    array = np.arange(1000).astype(dtype)
    out = read_array(compress(array), dtype, what="x", count=1000)
    assert out.dtype == dtype and (out == array).all()
    strided = array.reshape(20, 50).T
    assert (read_array(compress(strided), dtype, what="x", count=1000) == strided.ravel()).all()


def test_a_frame_declares_its_size_and_a_checksum():
    parameters = zstandard.get_frame_parameters(compress(b"a" * 777))
    assert parameters.content_size == 777 and parameters.has_checksum


def test_equal_content_gives_equal_bytes():
    data = np.random.default_rng(0).integers(0, 20, 10_000).astype(np.uint8)
    assert compress(data) == compress(data.tobytes()) == compress(memoryview(data.tobytes()))


@given(st.binary(min_size=1, max_size=300), st.data())
def test_every_flipped_bit_is_noticed(data, draw):
    frame = bytearray(compress(data))
    frame[draw.draw(st.integers(0, len(frame) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        content = decompress(bytes(frame), max_bytes=len(data), what="x")
    except CacheCorruptError:
        return
    assert content == data  # a bit that zstd gives no meaning


@given(st.binary(min_size=1, max_size=300), st.data())
def test_truncated_or_prolonged(data, draw):
    frame = compress(data)
    cut = draw.draw(st.integers(0, len(frame) - 1))
    for broken in (frame[:cut], frame + b"x", frame + frame):
        with pytest.raises(CacheCorruptError, match="input_ids"):
            decompress(broken, max_bytes=len(data), what="input_ids")


def test_zstd_bomb_is_refused_before_it_is_unpacked():
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(CacheCorruptError, match="at most 1000 bytes was expected, found one that declares 67108864"):
        decompress(bomb, max_bytes=1000, what="x")


def test_a_frame_without_a_size_is_refused():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b"a" * 100)
    with pytest.raises(CacheCorruptError):
        decompress(frame, max_bytes=1 << 30, what="x")


@pytest.mark.parametrize("declared", [50, 99, 101, 200])
def test_a_frame_that_lies_about_its_size(declared):
    honest = compress(bytes(range(100)))
    assert honest[5] == 100  # one byte of content size follows magic and descriptor
    with pytest.raises(CacheCorruptError):
        decompress(honest[:5] + bytes([declared]) + honest[6:], max_bytes=1000, what="x")


@pytest.mark.parametrize("junk", [b"", b"\x28\xb5\x2f\xfd", b"not a frame at all", bytes(40)])
def test_junk(junk):
    with pytest.raises(CacheCorruptError):
        decompress(junk, max_bytes=1000, what="x")


@pytest.mark.parametrize("count", [0, 9, 11])
def test_another_number_of_elements(count):
    with pytest.raises(CacheCorruptError, match="lowest_level"):
        read_array(compress(np.zeros(10, np.float32)), np.float32, what="lowest_level", count=count)


def test_more_than_a_frame_holds_is_not_written(monkeypatch):
    monkeypatch.setattr("kdcache.cache.frames.MAX_FRAME_BYTES", 10)
    assert compress(bytes(10))
    with pytest.raises(ConfigError, match="at most 10 bytes, found 11"):
        compress(bytes(11))


def test_half_an_element():
    with pytest.raises(CacheCorruptError, match="elements of"):
        read_array(compress(b"abcdef"), np.uint32, what="x", max_count=10)


def test_max_count_bounds_but_does_not_fix():
    assert len(read_array(compress(np.zeros(3, np.uint32)), np.uint32, what="x", max_count=5)) == 3
    with pytest.raises(CacheCorruptError):
        read_array(compress(np.zeros(6, np.uint32)), np.uint32, what="x", max_count=5)


def test_a_bound_is_never_left_out():
    with pytest.raises(AssertionError):
        read_array(compress(b"abcd"), np.uint32, what="x")
