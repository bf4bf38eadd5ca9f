"""Without a GPU, Triton kernels run in Triton's CPU interpreter. Triton decides when it is first imported, so: here."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
