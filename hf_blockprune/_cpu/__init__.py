"""C++ microkernels for block-sparse products and merging tokens on Linux CPUs.

They have a plain C ABI and know nothing of torch, so one build serves every version of it; `library.py` binds them,
`backend.py` makes them the op's `cpu` backend, `merging.py` lets tokens merge with them. Where they were not built,
torch does without them.
"""

import torch  # noqa: F401  (before `backend`: once it is there the op is defined, with that module whole)
