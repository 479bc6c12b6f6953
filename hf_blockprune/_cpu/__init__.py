"""C++ microkernels for block-sparse products on Linux CPUs.

`kernels.h`, `tile.cpp` and `driver.cpp` have a plain C ABI and know nothing of torch, so one build serves every version
of it; `library.py` binds them, `backend.py` makes them the op's `cpu` backend. Where they were not built, the op runs
without them.
"""

import torch  # noqa: F401  (before `backend`: once it is there the op is defined, with that module whole)
