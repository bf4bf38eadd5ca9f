"""What has to be said before NumPy, torch and Triton are imported, so: here.

Without a GPU, Triton kernels run in Triton's CPU interpreter. Each of pytest's workers computes with its share of the CPUs:
8 workers of 14 threads each took minutes over what takes one of them seconds.
"""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", str(max(num_cpus // num_workers, 1)))
