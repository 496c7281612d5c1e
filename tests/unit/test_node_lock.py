"""The lock that keeps two runs from working on one node, held by real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import node_lock


def test_one_after_the_other(tmp_path):
    with node_lock.held("x", 1, str(tmp_path)):
        with pytest.raises(node_lock.Busy, match="an earlier run still works on this node after 0 s"):
            with node_lock.held("x", 0, str(tmp_path)):
                pass
        with node_lock.held("y", 0, str(tmp_path)):
            pass
    with node_lock.held("x", 0, str(tmp_path)):
        pass


def test_orphan_of_a_killed_process_holds_it_until_it_ends(tmp_path):
    module = "\n".join(
        [
            "import runpy, subprocess, time",
            f"runpy.run_path({os.path.join(os.path.dirname(__file__), 'conftest.py')!r})",
            "from ansible_collections.onprem.torch.plugins.module_utils import node_lock",
            f"with node_lock.held('x', 1, {str(tmp_path)!r}) as lock:",
            "    child = subprocess.Popen(['sleep', '60'], pass_fds=[lock])",
            "    print(child.pid, flush=True)",
            "    time.sleep(60)",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", module], stdout=subprocess.PIPE, text=True) as process:
        orphan = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with pytest.raises(node_lock.Busy):
                with node_lock.held("x", 0, str(tmp_path)):
                    pass
        finally:
            os.kill(orphan, signal.SIGKILL)
    with node_lock.held("x", 10, str(tmp_path)):
        pass
