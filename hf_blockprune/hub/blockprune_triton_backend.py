"""The op's `triton` backend: what the kernel needs to know of a layer, and how it is run.

Triton itself is imported when the kernel runs for the first time: not where there is no GPU.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockprune_backends import Backend, checked_bias, register_backend
from .blockprune_layout import PackedWeight, RowOrders, check_packed, grid_shape, row_orders, unpack
from .blockprune_prepared import PreparedCache
from .blockprune_reference import ACTIVATIONS, LayerArguments
from .blockprune_tuning import Choice, Config, Problem, Tuner, candidates

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_ROWS = (16, 32, 64, 128)  # heights that tensor cores multiply
# Share of blocks left up to which the kernel is preferred where nothing was measured. A guess, from counting how often
# x is read again.
UNMEASURED_BREAK_EVEN = 0.4
SHARED_MEMORY = 99 * 1024  # of consumer cards; others have more


class TritonBackend:
    """Block-sparse products with the Triton kernel."""

    def __init__(self) -> None:
        self._orders: PreparedCache[RowOrders] = PreparedCache()
        self._tuners: dict[torch.device, Tuner] = {}
        self._choices: dict[tuple[torch.device, Problem], Choice] = {}

    def supports(self, x: Tensor, layer: LayerArguments) -> bool:
        """Whether the kernel knows device, dtype and block height."""
        weight = layer.weight
        device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
        return (
            x.device.type == device
            and x.device == weight.device
            and x.dtype == weight.dtype
            and x.dtype in DTYPES
            and weight.shape[1] in BLOCK_ROWS
        )

    def pays(self, x: Tensor, layer: LayerArguments) -> bool:
        """Whether it is faster than a dense product, as measured, or as guessed where nothing may be measured."""
        if x.device.type != "cuda":  # the interpreter is for tests
            return False
        choice = self.choose(x, layer)
        if choice.sparse_ms is None or choice.dense_ms is None:
            return layer.weight.numel() <= UNMEASURED_BREAK_EVEN * x.shape[-1] * layer.out_features
        return choice.sparse_ms < choice.dense_ms

    def forward(self, x: Tensor, layer: LayerArguments) -> Tensor:
        """See `blockprune_backends.Backend`."""
        return self.forward_all(x, [layer])[0]

    def forward_all(self, x: Tensor, layers: list[LayerArguments]) -> list[Tensor]:
        """Several layers that read the same x, which is transposed at most once."""
        inputs = _Inputs(x)
        return [self._run(inputs, layer, self.choose(x, layer).config) for layer in layers]

    def choose(self, x: Tensor, layer: LayerArguments) -> Choice:
        """How to run a call, measured first where it is new and `BLOCKPRUNE_AUTOTUNE` allows it."""
        problem = _problem(x, layer)
        tunes = len(x) > 0 and _tunes(x.device)
        known = self._choices.get((x.device, problem)) if tunes else None
        if known is not None:
            return known
        configs = candidates(problem, _shared_memory(x.device))
        if not tunes or _recording(x.device):  # nothing can be timed while a CUDA graph is recorded
            return Choice(configs[0])
        tuner = self._tuners.get(x.device)
        if tuner is None:
            tuner = self._tuners[x.device] = Tuner(_device_name(x.device))
        choice = tuner.choose(
            problem,
            configs,
            lambda config: _milliseconds(lambda: self._run(_Inputs(x), layer, config), x.device),
            lambda: _dense_milliseconds(x, layer),
        )
        self._choices[x.device, problem] = choice
        return choice

    def _run(self, inputs: "_Inputs", layer: LayerArguments, config: Config) -> Tensor:
        from .blockprune_triton import launch

        x, orders = inputs.x, self._checked(inputs.x.shape[1], layer)
        layer = layer._replace(
            weight=layer.weight.contiguous(),
            crow_indices=layer.crow_indices.contiguous(),
            col_indices=layer.col_indices.contiguous(),
            bias=checked_bias(layer, x.dtype),
            residual=None if layer.residual is None else layer.residual.contiguous(),
        )
        source = inputs.k_major if config.k_major else inputs.token_major
        return launch(source, len(x), layer, orders, config=config, precision=_precision(x.dtype))

    def _checked(self, in_features: int, layer: LayerArguments) -> RowOrders:
        """The orders of a layer's block rows; the first time, indices are read from the device and checked.

        Orders stay right, if not the best, for indices that change unnoticed.

        Raises:
            BlockSparseFormatError: indices that would lead outside the matrix.
        """
        packed = PackedWeight(*layer[:3])

        def make() -> RowOrders:
            check_packed("block_sparse_linear", packed, layer.out_features, in_features)
            return row_orders(packed.crow_indices)

        return self._orders.get(packed[1:], (in_features, layer.out_features, packed.weight.shape), make)


class _Inputs:
    """x [tokens, in_features] as the kernel takes it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def token_major(self) -> Tensor:
        return self.x if self.x.stride(1) == 1 else self.x.contiguous()

    @cached_property
    def k_major(self) -> Tensor:
        from .blockprune_triton import k_major

        return k_major(self.x)


def _problem(x: Tensor, layer: LayerArguments) -> Problem:
    rows, cols = layer.weight.shape[1:]
    return Problem(
        dtype=str(x.dtype).removeprefix("torch."),
        element_bytes=x.element_size(),
        precision=_precision(x.dtype),
        rows=rows,
        cols=cols,
        tokens=len(x),
        out_features=layer.out_features,
        in_features=x.shape[1],
        density=layer.weight.numel() / max(1, layer.out_features * x.shape[1]),
    )


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products, as `torch.set_float32_matmul_precision` has it."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _tunes(device: torch.device) -> bool:
    """Unless told otherwise on GPUs, and in the interpreter if told so."""
    return os.environ.get("BLOCKPRUNE_AUTOTUNE", "1" if device.type == "cuda" else "0") != "0"


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED_MEMORY
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED_MEMORY)


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name} torch {torch.__version__} triton {version('triton')}"


def _milliseconds(run: Callable[[], object], device: torch.device) -> float | None:
    """Median time of a call, None where the kernel cannot be compiled for the device or needs more than it has."""
    from .blockprune_triton import NOT_FOR_THIS_DEVICE, do_bench

    try:
        run()
    except NOT_FOR_THIS_DEVICE as error:
        logger.info(f"a configuration of the block-sparse kernel does not run here: {error}")
        return None
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        # One number, where one of many is asked for.
        return do_bench(run, warmup=5, rep=20, return_mode="median")  # pyright: ignore[reportReturnType]


def _dense_milliseconds(x: Tensor, layer: LayerArguments) -> float:
    dense = unpack(PackedWeight(*layer[:3]), layer.out_features, x.shape[1])
    activation = ACTIVATIONS[layer.activation]
    milliseconds = _milliseconds(lambda: activation(F.linear(x, dense, layer.bias)), x.device)
    assert milliseconds is not None
    return milliseconds


def register() -> None:
    """Make the kernel the op's preferred backend on GPUs, where triton is installed."""
    if find_spec("triton") is None:
        return
    backend = TritonBackend()
    functions = backend.forward, backend.supports, backend.pays, backend.forward_all
    register_backend("triton", Backend(*functions, beats_dense=_beats_dense))


def _beats_dense(layer: LayerArguments, in_features: int, tokens: int) -> bool:
    """Whether anything is left out: whether a kernel pays is measured at its first call.

    Where it does not, unpacking for each call is what remains.
    """
    blocks, rows, cols = layer.weight.shape
    is_whole = blocks == prod(grid_shape(layer.out_features, in_features, (rows, cols)))
    return layer.weight.is_cuda and not is_whole
