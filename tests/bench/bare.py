# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The floor: a script over parallel SSH, without Ansible: bare.py SCRIPT KEY USER ADDRESS... Connections are made anew."""
from __future__ import annotations

import asyncio
import pathlib
import sys

import asyncssh


async def check(address: str, user: str, key: str, script: str) -> int:
    async with asyncssh.connect(address, username=user, client_keys=[key], known_hosts=None, connect_timeout=20) as connection:
        done = await connection.run("sudo sh -s", input=script)
    if done.exit_status:
        raise SystemExit(f"{address}: {done.stderr}")
    return len(done.stdout)


async def main(script: str, key: str, user: str, addresses: list[str]) -> None:
    sizes = await asyncio.gather(*(check(address, user, key, script) for address in addresses))
    print(f"{len(sizes)} nodes answered with {sum(sizes)} bytes")


if __name__ == "__main__":
    asyncio.run(main(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2], sys.argv[3], sys.argv[4:]))
