"""S7 in small; the campaign is ``make prove-outage``."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from tests.abuse.crashes import prepare, run_to_the_end
from tests.abuse.outage import kill_client, kill_server, server_for_forks
options, root = json.loads(sys.argv[1]), Path(sys.argv[2])
prepare()
run_to_the_end({**options, "output": str(root / "reference")})
with server_for_forks(root / "seaweed") as server:
    here = {"options": options, "reference": root / "reference"}
    killed = [kill_client(**here, name="killed", number=25, when="after", workers=1, then=2)]
    said = [kill_server(**here, server=server, name="away", number=30, when="before", workers=2, then=1)]
print(json.dumps({"killed": killed, "said": said}))
"""


def test_a_server_and_a_client_that_are_killed(tmp_path, tiny_teacher, corpus_file):
    """A dump whose server is away for too long says so and ends; run again on other workers, as after a kill, it makes a folder's bytes."""
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
    assert result["killed"] == [True]
    assert all(said >= 1 for said in result["said"])
