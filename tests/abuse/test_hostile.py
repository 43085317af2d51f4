"""S3 in small; the campaign is ``make prove-hostile``."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from tests.abuse.hostile import campaign
from tests.golden.make import GOLDEN
from tests.strategies import make_plan, write_cache
root = Path(sys.argv[1])
sound = [root / "packed", root / "exact"]
for path in sound:
    write_cache(path, make_plan(codec__name=path.name))
sound += [GOLDEN / name for name in ("packed-top_k-id-tables", "packed-frequencies-id-tables", "packed-sampled", "hidden-bfloat16")]
print(json.dumps(campaign(sound, root, number=8, seed=0)))
"""


def test_caches_from_strangers(tmp_path):
    """Refused, found, or read as something that could have been written; no crash, no other error, no code, nothing written or deleted outside."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    table = json.loads(done.stdout)
    assert len(table) == 13
    for attack, outcomes in table.items():
        assert "HARM" not in outcomes, (attack, done.stderr)
        assert outcomes["refused"] >= 3, (attack, outcomes)
    left = ["cache", "exact", "output", "outside", "packed", "report"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
