"""S7 in small; the campaign is ``make prove-outage``."""

from tests.abuse.crashes import told_by

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
    said = [kill_server(**here, server=server, name="away", number=30, when="before", workers=1, then=2)]
print(json.dumps({"killed": killed, "said": said}))
"""


def test_a_server_and_a_client_that_are_killed(tmp_path, tiny_teacher, corpus_file):
    """A dump whose server is away for too long says so and ends; run again on other workers, as after a kill, it makes a folder's bytes."""
    result = told_by(SCRIPT, tiny_teacher, corpus_file, tmp_path)
    assert result["killed"] == [True]
    assert all(said >= 1 for said in result["said"])
