"""Finds and binds the compiled kernels."""

import ctypes
import functools
import os
import platform
import struct
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

LAYER_FIELDS = 14  # of kernels.h's Layer, 8 bytes each
INT8 = 2  # kernels.h's DType
NO_MEMORY, BAD_INDICES = 1, 2  # kernels.h's Status
PATH = Path(__file__).with_name("libblockprune_cpu.so")
ISA_VARIABLE = "BLOCKPRUNE_CPU_ISA"


class CpuLibrary:
    """The compiled kernels for one instruction set.

    Args:
        isa: "avx512bf16", "avx512", "avx2" or "baseline"; by default the best that this processor has.
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
        self._linear = library.blockprune_cpu_linear
        self._linear.argtypes = [c_char_p, c_void_p, *[c_int64] * 3, c_int32, c_int32, c_void_p, c_int64, c_int32]
        self._unpack = library.blockprune_cpu_unpack
        self._unpack.argtypes = [c_int64, c_int64, c_void_p, c_int32]
        self._merge = library.blockprune_cpu_merge
        self._merge.argtypes = [c_char_p, c_void_p, c_int32]
        self._half = library.blockprune_cpu_half
        self._half.argtypes = [c_char_p, c_void_p, c_int32]
        self._work = library.blockprune_cpu_work
        self._work.argtypes, self._work.restype = [c_char_p, c_int64, c_void_p], c_int64

    def linear(
        self,
        x: int,
        stride: int,
        tokens: int,
        in_features: int,
        dtype: int,
        layers: list[int],
        threads: int,
        weights: int | None = None,
    ) -> bool:
        """Products of layers that read the same x; the caller answers for every address, and for the indices' lengths.

        Args:
            x: address of [tokens, in_features].
            stride: elements from one token to the next.
            tokens, in_features: its shape.
            dtype: kernels.h's number.
            layers: the fields of kernels.h's Layer, one layer after the other, null as 0.
            threads: at most.
            weights: their number where they have another dtype.

        Returns:
            Whether all indices kept the format's rules; else nothing was computed.

        Raises:
            MemoryError: no room for working copies of inputs and weights.
        """
        fields, count = _array(layers), len(layers) // LAYER_FIELDS
        weights = dtype if weights is None else weights
        status = self._linear(self._isa, x, stride, tokens, in_features, dtype, weights, fields, count, threads)
        return status == 0 or _done(status)

    def unpack(self, in_features: int, element_bytes: int, layer: list[int], threads: int) -> bool:
        """A layer's dense matrix [out_features, in_features] into its y.

        Args:
            in_features: its width.
            element_bytes: 2, 4 or 8.
            layer: the fields of kernels.h's Layer.
            threads: at most.

        Returns:
            Whether the indices kept the format's rules; else nothing was written.

        Raises:
            MemoryError: no room for a copy of the indices.
        """
        return _done(self._unpack(in_features, element_bytes, _array(layer), threads))

    def merge(self, fields: list[int], threads: int) -> bool:
        """Merge tokens; the caller answers for every address and size.

        Args:
            fields: of merge.h's Merge.
            threads: at most.

        Returns:
            Whether all places are tokens; else what was written is of no use.

        Raises:
            MemoryError: no room for working copies.
        """
        return _done(self._merge(self._isa, _array(fields), threads))

    def half(self, half: bytes, threads: int) -> bool:
        """Half of a layer; the caller answers for every address, and for the indices' lengths.

        Args:
            half: half.h's Half.
            threads: at most.

        Returns:
            Whether all indices kept the format's rules; else nothing was computed.

        Raises:
            MemoryError: no room for working copies and for what passes between the steps.
        """
        return _done(self._half(self._isa, half, threads))

    def work(self, in_features: int, layer: list[int]) -> int:
        """Multiplications for each token that the kernels make of a layer, padding included; -1 for bad indices."""
        return self._work(self._isa, in_features, _array(layer))


def _array(fields: list[int]) -> bytes:
    return struct.pack(f"{len(fields)}q", *fields)


def _done(status: int) -> bool:
    if status == NO_MEMORY:
        raise MemoryError("no memory for working copies of inputs and weights")
    return status != BAD_INDICES


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
