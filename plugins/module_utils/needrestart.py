# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What needrestart is told: to leave a training job's units alone when it restarts services after a package update."""

from __future__ import annotations

import glob
import os

FOLDER = "/etc/needrestart/conf.d"
PATH = f"{FOLDER}/onprem.torch.conf"
# Perl. The supervisor would bring the job back after such a restart, but each would cost what was done since a checkpoint.
TEXT = """# Written by onprem.torch. A training job goes on with the libraries that it has loaded until it is started anew.
$nrconf{override_rc}{qr(^torchrun-)} = 0;
"""


def jobs_left(units: str, besides: str) -> bool:
    """Return whether units of other jobs than ``besides`` lie in the folder of units."""
    return any(os.path.basename(path) != besides for path in glob.glob(os.path.join(glob.escape(units), "torchrun-*.service")))
