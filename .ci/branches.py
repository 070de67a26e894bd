"""Print the share of branches that the tests take in each room of the core; fail if one is not above 95%.

Reads coverage.json, which `coverage json` writes.
"""

import json
import sys
from collections import Counter
from pathlib import Path

ROOMS = ("solvers", "implicit", "operators", "kernels")
LEAST = 95.0  # percent

branches: Counter[str] = Counter()
taken: Counter[str] = Counter()
for name, file in json.loads(Path("coverage.json").read_text())["files"].items():
    room = Path(name).parts[-2]
    branches[room] += file["summary"]["num_branches"]
    taken[room] += file["summary"]["covered_branches"]
shares = {room: 100 * taken[room] / max(branches[room], 1) for room in ROOMS}
for room, share in shares.items():
    print(f"{room:10} {share:5.1f}% of {branches[room]} branches")
sys.exit(any(share <= LEAST for share in shares.values()))
