"""Finds and binds the compiled kernels."""

import ctypes
import functools
import os
import platform
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

LAYER_FIELDS = 11  # of kernels.h's Layer, 8 bytes each
PATH = Path(__file__).with_name("libblockprune_cpu.so")
ISA_VARIABLE = "BLOCKPRUNE_CPU_ISA"


class CpuLibrary:
    """The compiled kernels for one instruction set.

    Args:
        isa: "avx512", "avx2" or "baseline"; by default the best that this processor has.
        path: of the shared library.

    Attributes:
        isa: its name.
        has_threads: whether torch's OpenMP runtime was found; without it one thread does all.

    Raises:
        OSError: the library is not there, or was built for another machine.
        ValueError: the instruction set is unknown or not to be had here.
    """

    def __init__(self, isa: str | None = None, path: Path = PATH) -> None:
        library = ctypes.CDLL(str(path))
        library.blockprune_cpu_isa.argtypes, library.blockprune_cpu_isa.restype = [c_char_p], c_char_p
        found = library.blockprune_cpu_isa(isa.encode() if isa else None)
        if found is None:
            raise ValueError(f"{ISA_VARIABLE}: {isa!r} is no instruction set of this processor; leave it unset")
        self._isa: bytes = found
        self.isa = found.decode()
        self.has_threads = bool(library.blockprune_cpu_has_threads())
        self._strip_rows = library.blockprune_cpu_strip_rows
        self._strip_rows.argtypes = [c_char_p, c_int64]
        self._linear = library.blockprune_cpu_linear
        self._linear.argtypes = [c_char_p, c_void_p, *[c_int64] * 3, c_int32, c_void_p, c_int64, c_int32]

    def strip_rows(self, rows: int) -> int:
        """Outputs that the kernel computes at once, for blocks of so many rows (a multiple of 16)."""
        return self._strip_rows(self._isa, rows)

    def linear(
        self, x: int, stride: int, tokens: int, in_features: int, dtype: int, layers: list[int], threads: int
    ) -> None:
        """Products of layers that read the same x; the caller answers for every address.

        Args:
            x: address of [tokens, in_features].
            stride: elements from one token to the next.
            tokens, in_features: its shape.
            dtype: kernels.h's number.
            layers: the fields of kernels.h's Layer, one layer after the other, null as 0.
            threads: at most.

        Raises:
            MemoryError: no room for a copy of some inputs.
        """
        fields = (c_int64 * len(layers))(*layers)
        count = len(layers) // LAYER_FIELDS
        if self._linear(self._isa, x, stride, tokens, in_features, dtype, fields, count, threads):
            raise MemoryError("block-sparse product: no memory for its working copy of the inputs")


@functools.cache
def find_library() -> tuple[CpuLibrary | None, str]:
    """(the kernels, or None; which they are, or why there are none)."""
    if not PATH.exists():
        system = f"{platform.system()} {platform.machine()}"
        return None, f"no compiled kernels ({system}); reinstall with a C++ compiler for them"
    try:
        library = CpuLibrary(os.environ.get(ISA_VARIABLE))
    except OSError as error:
        return None, f"the compiled kernels do not load ({error}); reinstall the package on this machine"
    return library, library.isa if library.has_threads else f"{library.isa}, one thread (no OpenMP runtime found)"
