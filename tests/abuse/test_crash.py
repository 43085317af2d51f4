"""S1 in small; the campaign is ``make prove-crash``."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from tests.abuse.crashes import campaign, every_commit_point, kinds, prepare
options, root, seed = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
prepare()
around_the_plan, in_the_shards = {"first": 7, "last": 11, "stride": 4}, {"first": 9, "stride": 33}
points = {kind: every_commit_point(here, root / kind, **(in_the_shards if kind in ("top_k", "hidden") else around_the_plan))
          for kind, here in kinds(options, root).items()}
print(json.dumps({"random": campaign(options, root / "random", num_kills=3, seed=seed), **points}))
"""


def test_killed_at_random_and_at_commit_points(tmp_path, tiny_teacher, corpus_file):
    """Resumed with 1, 2 and 3 workers, the finished cache is the uninterrupted one, byte for byte; transcoded ones too."""
    options = {
        "teacher": tiny_teacher, "dataset": corpus_file, "output": "", "split": "train[:6]", "seq_len": 64, "top_k": 8,
        "threads": 1, "batch_tokens": 256, "shard_positions": 300, "device": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options), str(tmp_path), "0"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result.pop("random")["kills"] >= 3
    assert all(found["kill_points"] >= 4 for found in result.values())
    assert all(found["half_written"] >= 1 for found in result.values())
    assert all(result[kind]["before_the_plan"] >= 1 for kind in ("id tables", "transcoded", "copied"))
