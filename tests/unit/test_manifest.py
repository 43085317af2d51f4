import hashlib
import itertools
import json

import pytest

from kdcache.cache.manifest import (
    Commit,
    Manifest,
    Plan,
    ShardStats,
    derive_manifest,
    differing_fields,
    parse,
    signed_json,
    to_json,
)
from kdcache.errors import CacheCorruptError, CacheFormatError, CacheMismatchError
from kdcache.specs import canonical_json
from tests.strategies import DIGEST, make_plan, make_spec


def commit(shard, plan=None, **changes):
    # sums whose order matters in floating point
    stats = ShardStats(
        num_rows=4, num_rows_skipped=1, num_rows_truncated=0, num_rows_split=0, num_sequences=3, num_positions=50 + shard, num_targets=40, num_entries=320,
        sum_tail_mass=[0.1, 1e16, -1e16, 0.3][shard % 4], sum_entropy=0.1 * shard, sum_label_nll=1e9 / (shard + 3),
        num_kl_targets=8, sum_codec_kl=1e-3 * shard,
    )  # fmt: skip
    fields = {
        "plan": (plan or make_plan()).fingerprint,
        "shard": shard,
        "digest": f"{shard:032x}",
        "num_bytes": 1000 + shard,
        "stats": stats,
        "worker": f"host:{shard}",
        "finished_at": "2025-01-01T00:00:00+00:00",
        "seconds": 1.5 * shard,
    }
    return Commit(**{**fields, **changes})


def resigned(record, **changes):
    """The file of a record with some fields changed by someone who knows the format."""
    return signed_json({**record.model_dump(mode="json"), **changes})


# --- canonical JSON ---------------------------------------------------------------------------------------------------


def test_canonical_json_is_one_spelling():
    assert canonical_json({"b": 1, "a": [1.0, None, "é"]}) == '{"a":[1.0,null,"é"],"b":1}'.encode()
    assert canonical_json({"b": {"d": 1, "c": 2}, "a": 3}) == canonical_json({"a": 3, "b": {"c": 2, "d": 1}})
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_to_json_is_sorted_readable_and_signed():
    data = to_json(make_plan())
    fields = json.loads(data)
    assert list(fields) == sorted(fields)
    assert data.endswith(b"}\n") and b'\n  "fingerprint"' in data
    assert fields.pop("record_digest") != make_plan().fingerprint
    assert signed_json(fields) == data


@pytest.mark.parametrize("record", [make_plan(), commit(1), derive_manifest(make_plan(), [commit(0), commit(2)])])
def test_records_come_back(record):
    again = parse(type(record), to_json(record), "x")
    assert again == record and to_json(again) == to_json(record)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format_version":1} x', b"1" * 10_000])
def test_not_json(junk):
    with pytest.raises(CacheFormatError, match=r"plan\.json"):
        parse(Plan, junk, "plan.json")


@pytest.mark.parametrize("junk", [b"[]", b"1", b'"x"', b"null", b"{}"])
def test_json_that_is_no_record(junk):
    with pytest.raises(CacheFormatError, match="format version 1 was expected, found None"):
        parse(Plan, junk, "x")


@pytest.mark.parametrize("version", [2, 99, 0, -1, "1", None, 1.5])
def test_other_format_version(version):
    with pytest.raises(CacheFormatError, match="format version 1 was expected") as caught:
        parse(Plan, resigned(make_plan(), format_version=version), "x")
    newer = isinstance(version, int) and version > 1
    assert (caught.value.hint == "a newer kdcache wrote this cache") == newer


def test_unknown_field():
    with pytest.raises(CacheFormatError, match="extra: Extra inputs are not permitted"):
        parse(Commit, resigned(commit(0), extra=1), "x")


def test_missing_field():
    fields = commit(0).model_dump(mode="json")
    del fields["digest"]
    with pytest.raises(CacheFormatError, match="digest: Field required"):
        parse(Commit, signed_json(fields), "x")


@pytest.mark.parametrize(
    "change",
    [
        {"shard": -1},
        {"shard": 1 << 62},
        {"shard": 1.5},
        {"num_bytes": 0},
        {"num_bytes": 10**40},
        {"digest": "../../../../../../etc/passwd"},
        {"digest": "0" * 31},
        {"digest": "0" * 32 + "\n"},
        {"digest": "G" * 32},
        {"digest": None},
        {"head_digest": "../x"},
        {"plan": ""},
        {"stats": {}},
        {"batch_splits": -1},
    ],
)
def test_hostile_commit_fields(change):
    with pytest.raises(CacheFormatError):
        parse(Commit, resigned(commit(0), **change), "commits/00000.json")


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity"])
def test_nan_is_not_json(constant):
    data = to_json(commit(1)).replace(b'"seconds": 1.5', b'"seconds": ' + constant)
    with pytest.raises(CacheFormatError, match="not JSON"):
        parse(Commit, data, "x")


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperatures", [2.0]), ("temperatures", []), ("temperatures", [1.0, 1.0]), ("temperatures", [1.0, 0.0]),
     ("temperatures", [1.0, -2.0]), ("k", -1), ("k", 1 << 30), ("scheme", "other")],
)  # fmt: skip
def test_hostile_targets(name, value):
    fields = make_plan().model_dump(mode="json")
    fields["spec"]["targets"][name] = value
    with pytest.raises(CacheFormatError, match="spec.targets"):
        parse(Plan, signed_json(fields), "x")


def test_columns_of_unequal_length():
    fields = derive_manifest(make_plan(), [commit(0), commit(1)]).model_dump(mode="json")
    fields["shards"]["digest"].pop()
    with pytest.raises(CacheFormatError, match="columns have one length"):
        parse(Manifest, signed_json(fields), "x")


@pytest.mark.parametrize("numbers", [[(1 << 62) - 1] * 2, [(1 << 32) + 1, 0]])
def test_more_sequences_than_can_be_numbered(numbers):
    """A reader sums them in 64 bits, and a permutation of them is made to train."""
    fields = derive_manifest(make_plan(), [commit(0), commit(1)]).model_dump(mode="json")
    fields["shards"]["num_sequences"] = numbers
    with pytest.raises(CacheFormatError, match="sequences a shard"):
        parse(Manifest, signed_json(fields), "x")


@pytest.mark.parametrize("field", ["format_version", "record_digest", "spec", "unknown"])
def test_no_depth_of_nesting_is_an_error_of_another_kind(field):
    """Python's own limit is met at another depth by whatever goes through the record first."""
    whole = to_json(make_plan()).decode()
    for depth in [*range(1, 200, 20), *range(200, 1100), 100_000]:
        nested = "[" * depth + "]" * depth
        text = whole.replace("{", f'{{"{field}": {nested}, ', 1) if field == "unknown" else whole.replace(
            f'"{field}": ', f'"{field}": {nested}, "x": ', 1)  # fmt: skip
        with pytest.raises((CacheFormatError, CacheCorruptError)):
            parse(Plan, text.encode(), "x")
        try:
            fields = json.loads(text)
            fields.pop("record_digest", None)
            signed = fields | {"record_digest": hashlib.sha256(canonical_json(fields)).hexdigest()[:32]}
            data = json.dumps(signed).encode()
        except (ValueError, RecursionError):
            continue
        if field != "record_digest":
            with pytest.raises(CacheFormatError):
                parse(Plan, data, "x")


def test_an_edited_record():
    data = to_json(commit(1)).replace(b"host:1", b"host:2")
    with pytest.raises(CacheCorruptError, match="record_digest .* damaged or edited"):
        parse(Commit, data, "x")


def test_a_record_without_a_digest():
    with pytest.raises(CacheCorruptError, match="record_digest None"):
        parse(Commit, canonical_json(commit(1).model_dump(mode="json")), "x")


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_names_do_not_count():
    base = make_spec()
    assert make_spec(teacher__name="/elsewhere", corpus__dataset="moved.jsonl").fingerprint == base.fingerprint
    assert differing_fields(base, make_spec(teacher__name="/elsewhere")) == []


CHANGES = {
    "teacher__digest": "f" * 32, "teacher__dtype": "bfloat16", "teacher__attention": "eager", "teacher__vocab_size": 299,
    "tokenizer__digest": "f" * 32, "tokenizer__chat_template": DIGEST, "corpus__digest": "f" * 32,
    "corpus__split": "test", "corpus__num_rows": 11, "corpus__seq_len": 65, "corpus__packing": True,
    "targets__k": 7, "targets__temperatures": [1.0, 4.0], "codec__name": "exact", "codec__step": 0.05,
    "compute__device": "cuda", "compute__threads": 2, "compute__batch_tokens": 2048, "rows_per_shard": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_everything_that_moves_a_number_counts(name):
    base, other = make_spec(), make_spec(**{name: CHANGES[name]})
    assert other.fingerprint != base.fingerprint
    assert [field for field, _, _ in differing_fields(base, other)] == [name.replace("__", ".")]


def test_fingerprints_are_all_different():
    prints = {make_spec(**{name: value}).fingerprint for name, value in CHANGES.items()}
    assert len(prints) == len(CHANGES)


def test_fingerprint_is_pinned():
    """Another value here means that every cache made so far is refused."""
    assert make_spec().fingerprint == "8d459197777626233e614e595e519ce6"


# --- shards and rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "per_shard"), [(1, 1), (10, 3), (9, 3), (2, 50), (100, 7)])
def test_row_ranges_cover_the_corpus_once(num_rows, per_shard):
    spec = make_spec(corpus__num_rows=num_rows, rows_per_shard=per_shard)
    rows = [row for shard in range(spec.num_shards) for row in spec.rows(shard)]
    assert rows == list(range(num_rows))
    for outside in (-1, spec.num_shards):
        with pytest.raises(ValueError):
            spec.rows(outside)


def test_make_codec():
    codec = make_spec(codec__step=0.1).make_codec()
    assert (codec.name, codec.vocab_size, codec.max_entries, codec.levels.step, codec.hidden_size) == (
        "packed",
        300,
        8,
        0.1,
        0,
    )
    hidden = make_spec(
        targets__scheme="hidden", targets__k=0, codec__name="exact", teacher__dtype="bfloat16"
    ).make_codec()
    assert (hidden.hidden_size, hidden.max_entries, hidden.hidden_dtype) == (16, 0, "bfloat16")


# --- derivation -------------------------------------------------------------------------------------------------------


def test_the_manifest_does_not_depend_on_the_order_of_commits():
    plan = make_plan()
    commits = [commit(shard) for shard in range(4)]
    spellings = {to_json(derive_manifest(plan, list(order))) for order in itertools.permutations(commits)}
    assert len(spellings) == 1


def test_the_manifest_does_not_know_who_and_when():
    plan = make_plan()
    ours = derive_manifest(plan, [commit(s) for s in range(4)])
    theirs = derive_manifest(
        plan,
        [
            commit(s, worker="other", finished_at="2026-01-01T00:00:00+00:00", seconds=9.0, batch_splits=2)
            for s in range(4)
        ],
    )
    assert to_json(ours) == to_json(theirs)


def test_totals():
    manifest = derive_manifest(make_plan(), [commit(2), commit(0)])
    assert manifest.stats.num_positions == 50 + 52
    assert manifest.num_bytes == 2002
    assert manifest.shards.shard == [0, 2] and manifest.shards.digest == [f"{s:032x}" for s in (0, 2)]
    assert not manifest.sealed
    assert derive_manifest(make_plan(), [commit(s) for s in range(4)]).sealed
    empty = derive_manifest(make_plan(), [])
    assert not empty.sealed and empty.stats.num_targets == 0 and empty.head_digest is None


@pytest.mark.parametrize(
    ("commits", "message"),
    [
        ([commit(0), commit(1, plan=make_plan(targets__k=7))], "shard 00001 belongs to plan"),
        ([commit(1), commit(1)], r"commits name shards \[1, 1\], the plan has 4"),
        ([commit(4)], r"\[4\], the plan has 4"),
        ([commit(0, head_digest=DIGEST), commit(1)], "different output heads"),
    ],
)
def test_commits_that_cannot_be_of_one_cache(commits, message):
    with pytest.raises(CacheMismatchError, match=message):
        derive_manifest(make_plan(), commits)


@pytest.mark.parametrize("huge", [{"num_bytes": (1 << 62) - 1}, {"stats": "num_positions"}])
def test_commits_that_add_up_to_too_much_are_refused(huge):
    plan = make_plan()
    commits = [commit(s) for s in range(plan.spec.num_shards)]
    if "stats" in huge:
        huge = {"stats": commits[0].stats.model_copy(update={huge["stats"]: (1 << 62) - 1})}
    commits[0] = commits[0].model_copy(update=huge)
    with pytest.raises(CacheMismatchError, match="add up"):
        derive_manifest(plan, commits)
