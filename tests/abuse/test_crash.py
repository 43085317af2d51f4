"""S1 in small; the campaign is ``make prove-crash``."""

from tests.abuse.crashes import told_by

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
    result = told_by(SCRIPT, tiny_teacher, corpus_file, tmp_path, "0")
    assert result.pop("random")["kills"] >= 3
    assert all(found["kill_points"] >= 4 for found in result.values())
    assert all(found["half_written"] >= 1 for found in result.values())
    assert all(result[kind]["before_the_plan"] >= 1 for kind in ("id tables", "transcoded", "copied"))
