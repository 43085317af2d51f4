"""S6 in small; the campaign is ``make prove-writers``."""

from tests.abuse.crashes import told_by

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
    result = told_by(SCRIPT, tiny_teacher, corpus_file, tmp_path)
    assert result["stops"] >= 2
    assert result["rounds"] == 1
