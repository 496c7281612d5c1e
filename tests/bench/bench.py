# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""All benches, or those that are named: bench.py [PART...]. Prints tables; what was measured goes to build/bench.json.

fresh      fresh clone to the first training step, and the same when all is provisioned
nochange   a provision that changes nothing on 2, 8 and 32 nodes, beside a bare script; torch on a node; bytes from outside
scale      plan and rendering for 256 and 512 hosts that are only simulated
verify     slow nodes and slow links at random places: how often they are named, and others accused; 32 nodes once
overhead   training under unit and supervisor beside torchrun by hand
recovery   what torchrun's own restarts make of a killed worker, beside the supervisors
"""
from __future__ import annotations

import json
import os
import platform
import sys
import time

import fresh
import nochange
import overhead
import recovery
import scale
import verify
from measure import ROOT

PARTS = {
    "fresh": fresh.main,
    "nochange": lambda: nochange.main(list(nochange.COUNTS)),
    "scale": lambda: scale.main([256, 512]),
    "overhead": lambda: overhead.main(10, 12),
    "recovery": lambda: recovery.main(3, 90),
    "verify": lambda: verify.main(20, 8, 1),
    "verify-32": lambda: verify.main(0, 32, 1),
}
RESULT = ROOT / "build" / "bench.json"


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"bench: there is no part {', '.join(unknown)}; there are: {' '.join(PARTS)}", file=sys.stderr)
        return 2
    RESULT.parent.mkdir(exist_ok=True)
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    failed = []
    for name in names or PARTS:
        print(f"\n=== {name}", flush=True)
        began = time.time()
        try:
            found = PARTS[name]()
        except (RuntimeError, AssertionError) as error:
            print(f"FAILED: {error}", flush=True)
            failed.append(name)
            continue
        result[name] = {"when": time.strftime("%Y-%m-%d", time.gmtime(began)), "cpus": os.cpu_count(), "machine": platform.machine(),
                        "seconds": round(time.time() - began), "result": found}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"    ({name}: {time.time() - began:.0f} s)", flush=True)
    print(f"\nall as JSON: {RESULT}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
