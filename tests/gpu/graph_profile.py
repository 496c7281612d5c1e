# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the time of a small all-reduce from a CUDA graph goes: what a graph costs, and what each further call in it costs.

usage: python -m torch.distributed.run --nproc-per-node=2 graph_profile.py
"""
from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

CALLS, REPLAYS = (1, 20, 100, 400), 20


def capture(tensor, calls):
    """A graph of so many all-reduces, warm."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _call in range(calls):
            dist.all_reduce(tensor)
    for _replay in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return graph


def spans(graph):
    """Microseconds of GPU time of each replay by CUDA events, and of wall time of a replay in a row of them."""
    dist.barrier(device_ids=[torch.cuda.current_device()])
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _mark in range(REPLAYS + 1)]
    start = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / REPLAYS * 1e6
    return statistics.median(one.elapsed_time(other) * 1e3 for one, other in zip(marks, marks[1:])), wall


def kernels(tensor):
    """Kernels of plain calls by torch's profiler: names and median microseconds."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _call in range(100):
            dist.all_reduce(tensor)
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"names": sorted({event.name[:60] for event in events}), "count": len(events),
            "median_us": statistics.median(event.time_range.elapsed_us() for event in events) if events else None}


def main():
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    device = torch.device("cuda", local)
    dist.init_process_group("nccl", device_id=device)
    tensor = torch.zeros(2, device=device)
    for _call in range(5):
        dist.all_reduce(tensor)
    torch.cuda.synchronize()
    result = {}
    for calls in CALLS:
        graph = capture(tensor, calls)
        gpu, wall = spans(graph)
        result[str(calls)] = {"gpu_us": gpu, "wall_us": wall}
        del graph
    result["each_us"] = (result["400"]["gpu_us"] - result["20"]["gpu_us"]) / 380
    result["graph_us"] = result["20"]["gpu_us"] - 20 * result["each_us"]
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    if "--kernels" in sys.argv:
        found = kernels(tensor)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
