"""S6: two writers of one shard, and a writer that was stopped past its lease: one winner, the other discards."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from tests.abuse.crashes import assert_same, contents, prepare, run_to_the_end, start
options, root = json.loads(sys.argv[1]), Path(sys.argv[2])
prepare()
run_to_the_end({**options, "output": str(root / "reference")})
reference = contents(root / "reference")


def short_leases():
    import kdcache.cache.commit as commit
    commit.LEASE_SECONDS = 1.0


def stop_before_the_commit():
    '''The process stops itself when its first shard is about to be published.'''
    short_leases()
    import kdcache.dump.worker as worker
    commit_shard, stopped = worker.commit_shard, []
    def stopping(*args, **kwargs):
        if not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)  # any thread may be the one that takes the signal; until then this one runs on
        return commit_shard(*args, **kwargs)
    worker.commit_shard = stopping


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# A writer stopped past its lease, another takes its shard over, the first wakes up.
cache = root / "stopped"
sleeper = start({**options, "output": str(cache)}, 0, 2, stop_before_the_commit)
os.waitpid(sleeper, os.WUNTRACED)
assert not list((cache / "commits").glob("*.json")), "stopped before its commit"
time.sleep(1.2)
other = start({**options, "output": str(cache)}, 1, 2, short_leases)
assert wait(other) == 0
assert (cache / "manifest.json").exists(), "the other one finished the cache alone"
os.kill(sleeper, signal.SIGCONT)
assert wait(sleeper) == 0, "the one that woke up lost, and ended well"
assert_same(cache, reference)

# Two writers that know nothing of each other: leases fail to keep them apart.
def no_leases():
    import kdcache.cache.commit as commit
    commit.claim = lambda store, shard: commit.Lease(store, shard)

cache = root / "blind"
children = [start({**options, "output": str(cache)}, 0, 2, no_leases) for _ in range(2)]
assert [wait(child) for child in children] == [0, 0]
assert_same(cache, reference)
print("ok")
"""


def test_two_writers_of_one_shard(tmp_path, tiny_teacher, corpus_file):
    options = {
        "teacher": tiny_teacher, "dataset": corpus_file, "output": "", "split": "train[:12]", "seq_len": 64, "top_k": 8,
        "threads": 1, "batch_tokens": 256, "shard_positions": 300, "device": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options), str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ok"
