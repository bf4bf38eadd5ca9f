"""What captured CUDA graphs consist of, asked of the driver."""

from __future__ import annotations

import ctypes
from collections import Counter

import pytest

from kit.interpreter import torch

# CUgraphNodeType of cuda.h
KINDS = (
    *("kernel", "memcpy", "memset", "host", "graph", "empty", "wait event", "event record", "signal", "wait"),
    *("alloc", "free", "batch memory op", "conditional"),
)


def keep_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """From here on every graph that is captured is kept in this list, whole, not only the form that runs."""
    kept: list[torch.cuda.CUDAGraph] = []
    make = torch.cuda.CUDAGraph

    def made() -> torch.cuda.CUDAGraph:
        kept.append(make(keep_graph=True))
        return kept[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", made)
    return kept


def node_kinds(graph: torch.cuda.CUDAGraph) -> Counter[str]:
    """How many nodes of each kind a kept graph has."""
    cuda = ctypes.CDLL("libcuda.so.1")
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert cuda.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert cuda.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    kinds: Counter[str] = Counter()
    for node in nodes:
        kind = ctypes.c_int()
        assert cuda.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kinds[KINDS[kind.value]] += 1
    return kinds
