"""Id tables from the pilot to the student: they cost nothing but a little of the teacher's time."""

import json
import os
import shutil

import numpy as np
import pytest

from kdcache.cache.commit import publish_plan
from kdcache.cache.garbage import collect_garbage
from kdcache.cache.manifest import Plan, parse
from kdcache.cache.reader import open_cache
from kdcache.cache.store import LocalStore
from kdcache.cache.tables import IdTables
from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.cache.verify import repair, verify_cache
from kdcache.dump import pilot, plan
from kdcache.dump.launch import dump, make_worker
from kdcache.dump.options import DumpOptions
from kdcache.dump.plan import make_plan
from kdcache.errors import CacheCorruptError, CacheMismatchError, ConfigError
from tests.abuse.crashes import contents
from tests.conftest import VOCAB_SIZE
from tests.reference_reader import read_cache


@pytest.fixture
def options(tiny_teacher, corpus_file):
    return {"teacher": tiny_teacher, "dataset": corpus_file, "seq_len": 64, "top_k": 8, "threads": 1, "batch_tokens": 256,
            "shard_positions": 300, "device": "cpu"}  # fmt: skip


def run(options, folder, **changes):
    return dump(DumpOptions(**options, output=str(folder), **changes))


@pytest.mark.parametrize("kind", ["global", "context"])
@pytest.mark.parametrize("scheme", [{}, {"targets": "hybrid", "num_draws": 6}])
def test_targets_are_the_same(options, tmp_path, kind, scheme):
    run(options, tmp_path / "plain", **scheme)
    run(options, tmp_path / "tables", id_tables=kind, **scheme)
    plain, tables = open_cache(tmp_path / "plain"), open_cache(tmp_path / "tables")
    assert tables.spec.codec.id_tables
    assert (len(tables.codec.id_tables.contexts) > 0) == (kind == "context")
    for a, b, c in zip(plain, tables, read_cache(tmp_path / "tables"), strict=True):
        assert (a.targets.token_ids == b.targets.token_ids).all()
        assert (c["token_ids"] == b.targets.token_ids).all()
        np.testing.assert_allclose(a.targets.logprobs, b.targets.logprobs, atol=1e-5)
        np.testing.assert_allclose(c["logprobs"], b.targets.logprobs, atol=1e-5)
        if scheme:
            assert (a.targets.counts == b.targets.counts).all()
    assert verify_cache(LocalStore(tmp_path / "tables")).intact


def test_a_small_corpus_has_none_unless_asked(options, tmp_path, monkeypatch):
    run(options, tmp_path / "small")
    assert open_cache(tmp_path / "small").spec.codec.id_tables is None
    monkeypatch.setattr(pilot, "WORTH_ORDER", 1000)
    run(options, tmp_path / "larger")
    assert len(open_cache(tmp_path / "larger").codec.id_tables.contexts) == 0
    monkeypatch.setattr(pilot, "WORTH_CONTEXTS", 2000)
    run(options, tmp_path / "large")
    assert len(open_cache(tmp_path / "large").codec.id_tables.contexts) > 0
    run(options, tmp_path / "exact", codec="exact")
    assert open_cache(tmp_path / "exact").spec.codec.id_tables is None


def test_a_resume_keeps_the_tables(options, tmp_path):
    """Whether it says so again or not; and an interrupted dump ends in the same bytes."""
    run(options, tmp_path / "whole", id_tables="context")
    reference = contents(tmp_path / "whole")
    for name, again in (("same", {"id_tables": "context"}), ("auto", {})):
        cache = tmp_path / name
        shutil.copytree(tmp_path / "whole", cache)
        for shard in ("00001", "00003"):
            (cache / "commits" / f"{shard}.json").unlink()
        (cache / "manifest.json").unlink()
        run(options, cache, **again)
        assert contents(cache) == reference
        assert run(options, cache, **again).already_done
    with pytest.raises(CacheMismatchError, match=r"codec\.id_tables"):
        run(options, tmp_path / "whole", id_tables="none")


@pytest.mark.parametrize("made", [{"id_tables": "context"}, {"targets": "hidden", "top_k": 1}])
def test_begun_again_where_only_the_tables_were_published(options, tmp_path, made):
    """A writer died, or a peer is at work, between its tables and its plan."""
    made = {**options, **made}
    run(made, tmp_path / "whole")
    transcode(TranscodeOptions(cache=str(tmp_path / "whole"), output=str(tmp_path / "copied")))
    for name in ("dumped", "copied-again"):
        shutil.copytree(tmp_path / "whole" / "tables", tmp_path / name / "tables")
    run(made, tmp_path / "dumped")
    transcode(TranscodeOptions(cache=str(tmp_path / "whole"), output=str(tmp_path / "copied-again")))
    assert contents(tmp_path / "dumped") == contents(tmp_path / "whole")
    assert contents(tmp_path / "copied-again") == contents(tmp_path / "copied")


@pytest.mark.parametrize("repair_first", [False, True])
@pytest.mark.parametrize("made", [{"id_tables": "context"}, {"targets": "hidden", "top_k": 1}])
def test_a_damaged_table_stays_until_its_successor_replaces_it(options, tmp_path, monkeypatch, made, repair_first):
    """Counted anew, or taken from the teacher again; where that gives something else, nothing is lost either."""
    made = {**options, **made}
    run(made, tmp_path / "c")
    whole = contents(tmp_path / "c")
    (table,) = (tmp_path / "c" / "tables").iterdir()
    damaged = bytearray(table.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    table.write_bytes(damaged)
    store = LocalStore(tmp_path / "c")
    assert not verify_cache(store).intact
    if repair_first:
        repair(store, verify_cache(store))
    else:
        (tmp_path / "c" / "manifest.json").unlink()
        (tmp_path / "c" / "commits" / "00001.json").unlink()
    assert table.read_bytes() == damaged
    if made.get("id_tables"):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(plan, "count_tables", lambda *_: IdTables.count([], VOCAB_SIZE, 0, 8))
            with pytest.raises(CacheCorruptError, match="gone or damaged, and counting them anew gives"):
                run(made, tmp_path / "c")
        assert table.read_bytes() == damaged
    run(made, tmp_path / "c")
    assert contents(tmp_path / "c") == whole and verify_cache(store).intact


def test_tables_of_someone_else_are_not_a_cache_begun(options, tmp_path):
    (tmp_path / "c" / "tables").mkdir(parents=True)
    (tmp_path / "c" / "tables" / "people.csv").write_text("name")
    with pytest.raises(ConfigError, match="it holds tables"):
        run(options, tmp_path / "c")


def test_two_workers_end_in_the_same_bytes(options, tmp_path):
    run(options, tmp_path / "one", id_tables="context")
    run(options, tmp_path / "two", id_tables="context", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_tables_of_the_first_to_plan_count(options, tmp_path):
    """A peer whose device counted otherwise publishes its plan in the moment before ours is put there."""

    class Raced(LocalStore):
        def put_if_absent(self, name, data):
            if name == "plan.json" and not self.exists(name):
                ours = parse(Plan, data, name)
                spec = ours.spec.model_copy(update={"codec": ours.spec.codec.model_copy(update=theirs)})
                publish_plan(LocalStore(self.root), Plan(spec=spec, fingerprint=spec.fingerprint))
            return super().put_if_absent(name, data)

    theirs, asked = {"id_tables": "0" * 32}, DumpOptions(**options, output=str(tmp_path / "c"), id_tables="context")
    store = Raced(tmp_path / "c")
    plan, _ = make_plan(store, asked, lambda draft, rows: make_worker(store, asked, draft, rows, 0, 1))
    assert plan.spec.codec.id_tables == "0" * 32
    assert (tmp_path / "c" / "tables").is_dir(), "we counted too"
    theirs = {"name": "exact", "id_tables": None}
    other = Raced(tmp_path / "d")
    with pytest.raises(CacheMismatchError, match=r"codec\.name"):
        make_plan(other, asked, lambda draft, rows: make_worker(other, asked, draft, rows, 0, 1))


def test_a_cache_begun_without_tables_gets_none(options, tmp_path):
    run(options, tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CacheMismatchError, match="begun without id tables"):
        run(options, tmp_path / "c", id_tables="global")


@pytest.mark.parametrize("damage", [os.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0")])
def test_lost_tables_are_found_and_counted_anew(options, tmp_path, damage):
    """The whole cache hangs on them; the same pilot makes the same bytes."""
    cache, store = tmp_path / "c", LocalStore(tmp_path / "c")
    run(options, cache, id_tables="context")
    reference = contents(cache)
    (tables,) = (cache / "tables").iterdir()
    damage(tables)
    with pytest.raises(CacheCorruptError, match="id tables"):
        open_cache(cache)
    audit = verify_cache(store)
    assert not audit.intact
    assert "id tables" in audit.problems[0]
    assert repair(store, audit) == []
    run(options, cache, id_tables="context")
    assert contents(cache) == reference


@pytest.mark.parametrize("all_committed", [True, False])
def test_lost_tables_that_are_counted_otherwise_are_refused(options, tmp_path, monkeypatch, all_committed):
    """Another device, another version: the last bits of the pilot differ. Sealing would leave a cache that nobody can read."""
    cache, store = tmp_path / "c", LocalStore(tmp_path / "c")
    run(options, cache, id_tables="context")
    for path in [*(cache / "tables").iterdir(), cache / "manifest.json"]:
        path.unlink()
    if not all_committed:
        (cache / "commits" / "00001.json").unlink()
    before = contents(cache)
    real = plan.count_tables

    def counted_otherwise(*about):
        tables = real(*about)
        return IdTables(tables.order[::-1].copy(), tables.contexts, tables.lists)

    monkeypatch.setattr(plan, "count_tables", counted_otherwise)
    with pytest.raises(CacheCorruptError, match="counting them anew gives") as caught:
        run(options, cache, id_tables="context")
    assert "where the cache was begun" in caught.value.hint
    assert contents(cache) == before
    monkeypatch.undo()
    run(options, cache, id_tables="context")
    assert verify_cache(store).intact


def test_garbage_is_not_what_the_plan_names(options, tmp_path):
    run(options, tmp_path / "c", id_tables="global")
    (tmp_path / "c" / "tables" / f"{'0' * 32}.safetensors").write_bytes(b"lost a race")
    assert collect_garbage(LocalStore(tmp_path / "c"))[0] == [f"tables/{'0' * 32}.safetensors"]
    assert verify_cache(LocalStore(tmp_path / "c")).intact


def test_transcoding_takes_the_tables_along(options, tmp_path):
    run(options, tmp_path / "c", id_tables="context")
    transcode(TranscodeOptions(cache=str(tmp_path / "c"), output=str(tmp_path / "fewer"), top_k=4))
    old, new = open_cache(tmp_path / "c"), open_cache(tmp_path / "fewer")
    assert new.spec.codec.id_tables == old.spec.codec.id_tables
    for a, b in zip(old, new, strict=True):
        assert len(b.targets.token_ids) == 4 * len(b.targets)
        assert set(b.targets.token_ids[:4]) <= set(a.targets.token_ids[:8])


def test_a_student_learns_the_same(options, tmp_path, tiny_student, monkeypatch):
    from kdcache.train import stream
    from kdcache.train.options import TrainOptions
    from kdcache.train.run import train

    monkeypatch.setattr(stream, "epoch_order", lambda num_sequences, *key: np.arange(num_sequences))
    run(options, tmp_path / "plain")
    run(options, tmp_path / "tables", id_tables="context")
    for name in ("plain", "tables"):
        train(TrainOptions(cache=str(tmp_path / name), student=tiny_student, output=str(tmp_path / f"{name}-student"),
                           max_steps=3, per_device_train_batch_size=4, logging_steps=1))  # fmt: skip
    logs = [(tmp_path / f"{name}-student" / "metrics.jsonl").read_text().splitlines() for name in ("plain", "tables")]
    losses = [[json.loads(line)["loss"] for line in log if "loss" in json.loads(line)] for log in logs]
    assert len(losses[0]) >= 3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
