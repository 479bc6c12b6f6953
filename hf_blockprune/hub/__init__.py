"""Files that travel with every checkpoint: the format, the op and its kernels, loading, the cost model."""

import torch  # noqa: F401  (before any of them: once it is there the op is defined, out of modules that are whole)
