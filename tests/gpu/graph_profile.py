# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the time of a small all-reduce from a CUDA graph goes: kernels and the gaps between them, by torch's profiler.

usage: python -m torch.distributed.run --nproc-per-node=2 graph_profile.py
"""
from __future__ import annotations

import json
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

CALLS, REPLAYS = 20, 20


def main():
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    device = torch.device("cuda", local)
    dist.init_process_group("nccl", device_id=device)
    tensor = torch.zeros(2, device=device)
    for _call in range(5):
        dist.all_reduce(tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _call in range(CALLS):
            dist.all_reduce(tensor)
    for _replay in range(5):
        graph.replay()
    dist.barrier(device_ids=[local])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _replay in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / REPLAYS / CALLS
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _replay in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    kernels = sorted((event.time_range.start, event.time_range.end, event.name) for event in found.events()
                     if event.device_type == torch.autograd.DeviceType.CUDA)
    gaps = [later[0] - earlier[1] for earlier, later in zip(kernels, kernels[1:])]
    steps = [later[0] - earlier[0] for earlier, later in zip(kernels, kernels[1:])]
    if dist.get_rank() == 0:
        print(json.dumps({"wall_us": wall * 1e6, "kernels_per_call": len(kernels) / REPLAYS / CALLS,
                          "kernel_us": statistics.median(end - begin for begin, end, _name in kernels),
                          "gap_us": statistics.median(gaps), "step_us": statistics.median(steps),
                          "gap_us_p90": sorted(gaps)[int(len(gaps) * 0.9)], "names": sorted({name[:80] for *_times, name in kernels})}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
