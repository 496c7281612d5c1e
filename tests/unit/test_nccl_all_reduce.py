"""What a verification leaves on a node."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import verify_config
from ansible_collections.onprem.torch.plugins.modules import nccl_all_reduce


@pytest.mark.parametrize("end", ["collected", "the next one begins"])
def test_the_environment_of_a_verification_does_not_stay(tmp_path, monkeypatch, end):
    """It may hold secrets; a run that is killed before it has collected the result leaves it to the next one."""
    environment = tmp_path / "nccl-verify.env"
    monkeypatch.setattr(nccl_all_reduce, "ENVIRONMENT_FILE", str(environment))
    monkeypatch.setattr(verify_config, "FOLDER", str(tmp_path / "nccl-verify"))
    monkeypatch.setattr(verify_config, "RESULTS", str(tmp_path / "nccl-verify/result"))
    module = SimpleNamespace(params={"launch": {"seconds": 0}, "run": {}, "programs": {"a.py": ""}}, run_command=lambda _words: (0, "", ""))
    verification = nccl_all_reduce.Verification(module)
    environment.write_text("TOKEN=secret")
    if end == "collected":
        verification.collected()
    else:
        who = SimpleNamespace(name="me", uid=os.getuid(), gid=os.getgid(), groups=())
        verification.write_programs(who)
        assert (tmp_path / "nccl-verify/a.py").exists()
    assert not environment.exists()
