# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""8 B all-reduce from a CUDA graph by NCCL itself, in a process for each GPU, without torch.distributed around it.

Tells what of a small all-reduce's time belongs to processes instead of threads, and what to torch.distributed.
usage: python -m torch.distributed.run --nproc-per-node=2 nccl_graph.py
"""
from __future__ import annotations

import ctypes
import os
import time

import torch
import torch.distributed as dist

CALLS, REPLAYS = (20, 100, 400), 20
FLOAT, SUM = 7, 0       # nccl.h: ncclFloat32, ncclSum


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


def check(code):
    if code:
        raise RuntimeError(f"NCCL error {code}")


def main():
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    import nvidia.nccl
    nccl = ctypes.CDLL(os.path.join(list(nvidia.nccl.__path__)[0], "lib", "libnccl.so.2"))
    nccl.ncclCommInitRank.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, UniqueId, ctypes.c_int]
    nccl.ncclAllReduce.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    unique = UniqueId()
    if rank == 0:
        check(nccl.ncclGetUniqueId(ctypes.byref(unique)))
    shared = [bytes(bytearray(unique))]
    dist.broadcast_object_list(shared, src=0)
    ctypes.memmove(ctypes.byref(unique), shared[0], 128)
    comm = ctypes.c_void_p()
    check(nccl.ncclCommInitRank(ctypes.byref(comm), world, unique, rank))
    tensor = torch.zeros(2, device="cuda")

    def call():
        check(nccl.ncclAllReduce(tensor.data_ptr(), tensor.data_ptr(), 2, FLOAT, SUM, comm, torch.cuda.current_stream().cuda_stream))

    for _call in range(20):
        call()
    torch.cuda.synchronize()
    for calls in CALLS:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _call in range(calls):
                call()
        for _replay in range(3):
            graph.replay()
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        for _replay in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        if rank == 0:
            print(f"graph of {calls} calls: {(time.perf_counter() - start) / REPLAYS / calls * 1e6:.2f} us a call", flush=True)
        del graph
    dist.barrier()
    os._exit(0)     # the communicator ends with the process


if __name__ == "__main__":
    main()
