"""S6 in small; the campaign is ``make prove-writers``."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from tests.abuse.crashes import blind_writers, prepare, stopped_writers
options, root = json.loads(sys.argv[1]), Path(sys.argv[2])
prepare()
print(json.dumps({**stopped_writers(options, root / "stopped", first=20, stride=90),
                  **blind_writers(options, root / "blind", rounds=1)}))
"""


def test_two_writers_of_one_shard(tmp_path, tiny_teacher, corpus_file):
    """A writer that was stopped past its lease and wakes up, and two that leases fail to keep apart: one wins, the cache is right."""
    options = {
        "teacher": tiny_teacher, "dataset": corpus_file, "output": "", "split": "train[:6]", "seq_len": 64, "top_k": 8,
        "threads": 1, "batch_tokens": 256, "shard_positions": 300, "device": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options), str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["stops"] >= 2
    assert result["rounds"] == 1
