# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a supervisor writes into state.json, as a shape: the job's user can write anything there.

docs/supervisor.md tells what the fields mean. Every field may be missing, so that the state of another release is read too.
"""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input
from ansible_collections.onprem.torch.plugins.module_utils.hostile_input import Fields, Flag, ListOf, MapOf, Maybe, Number, Text

FILE = "state/state.json"
# Nodes of one job, at most; ranks are more.
NODES = 10_000
MOMENT = Maybe(Number(0, hostile_input.LAST_MOMENT, whole=False))
COUNT = Maybe(Number())
CODE = Maybe(Number(-(2**31), 2**32))
WORD = Maybe(Text(40))
HOST = Maybe(Text(255))
TEXT = Maybe(Text(2000))
PROBLEMS = Maybe(ListOf(Fields({"check": WORD, "text": TEXT}), 100))
CHECKPOINT = Maybe(Fields({"path": Text(4096), "time": MOMENT}))
CAUSE = Fields(
    {
        "host": HOST,
        "node_rank": COUNT,
        "rank": COUNT,
        "local_rank": COUNT,
        "reason": WORD,
        "error": TEXT,
        "exit_code": CODE,
        "signal": WORD,
        "generation": COUNT,
        "time": MOMENT,
        "text": TEXT,
        "charged": Maybe(Flag()),
    }
)
STATE = Fields(
    {
        "version": COUNT,
        "job": Text(255),
        "host": HOST,
        "rank": COUNT,
        "nnodes": COUNT,
        "release": Text(255),
        "pid": COUNT,
        "written": MOMENT,
        "state": Text(40),
        "text": Text(2000),
        "since": MOMENT,
        "node": Fields(
            {"phase": WORD, "generation": COUNT, "problems": PROBLEMS, "connected": Flag(), "blocked": Maybe(ListOf(Text(500), 100))}
        ),
        "generation": Number(),
        "restarts": COUNT,
        "restarts_left": COUNT,
        "max_restarts": COUNT,
        "checkpoint": CHECKPOINT,
        "checkpoint_hosts": Maybe(ListOf(Text(255), NODES)),
        "checkpoints": Maybe(MapOf(Fields({"host": HOST, "path": Text(4096), "time": MOMENT}), NODES)),
        "last_exit": Maybe(Fields({"generation": COUNT, "time": MOMENT, "code": CODE, "ordered": Flag(), "cause": Maybe(CAUSE)})),
        "first_cause": Maybe(CAUSE),
        "history": Maybe(ListOf(CAUSE, 100)),
        "result": WORD,
        "stopped_by": HOST,
        "members": MapOf(
            Fields(
                {
                    "host": HOST,
                    "connected": Flag(),
                    "phase": WORD,
                    "generation": COUNT,
                    "problems": PROBLEMS,
                    "checkpoint": CHECKPOINT,
                }
            ),
            NODES,
        ),
    },
    required=("state",),
)
# A state of 10,000 nodes.
MOST_BYTES = 8 << 20


def read(job_root: str) -> tuple[dict[str, t.Any], str]:
    """Return what a node's supervisor knows, and a sentence where its file is not what a supervisor writes.

    Args:
        job_root: the job's folder, which is root's.
    """
    value, reason = hostile_input.load(job_root, FILE, STATE, MOST_BYTES) if job_root else (None, "")
    return value or {}, sentence(reason)


def parse(text: str) -> tuple[dict[str, t.Any], str]:
    """Return the same from the file's text."""
    value, reason = hostile_input.loads(text, STATE, "state.json", MOST_BYTES)
    return value or {}, sentence(reason)


def checked(value: t.Any) -> tuple[dict[str, t.Any], str]:
    """Return the same from a value that another node's module has returned."""
    if not value:
        return {}, ""
    try:
        return hostile_input.check(hostile_input.tidy(value), STATE), ""
    except hostile_input.Odd as odd:
        return {}, sentence(f"state.json: {odd}")


def sentence(reason: str) -> str:
    """Return what to do about a state that is not what a supervisor writes; empty without a reason."""
    if not reason:
        return ""
    return f"{reason}, which is not what a supervisor writes; stop and start the job, and it is written anew"
