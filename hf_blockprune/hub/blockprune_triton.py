"""The block-sparse product on GPUs, in Triton: y = act(x W^T + b) + residual.

A program makes an output tile of BLOCK_M tokens by one block row. The inner loop takes BLOCK_K of the row's kept
features at a time, of however many blocks, beside the same features gathered from x. Blocks of any width run that way.

Weights and indices are read where they are. Indices were checked, but may have been written to since without torch's
knowledge: no value of theirs leads outside of the arrays.

This file needs triton; the others do without where it is missing.
"""

# pyright: reportMissingParameterType=false
# A kernel says of its arguments only which are constants; Triton reads other annotations as types of its own.

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockprune_layout import RowOrders
from .blockprune_reference import LayerArguments
from .blockprune_tuning import Config

try:  # what is imported outside of such a block, transformers demands of everyone who loads a checkpoint's own code
    import triton
    import triton.language as tl
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench as do_bench
except ImportError:
    raise

# What a kernel raises that cannot be compiled for a device or needs more than it has.
NOT_FOR_THIS_DEVICE = (OutOfResources, PTXASError, CompilationError)


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(a)) / 2 = sigmoid(2a)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@triton.jit
def block_sparse_linear_kernel(
    x,
    weight,
    crow_indices,
    col_indices,
    row_order,
    bias,
    residual,
    y,
    tokens,
    readable_tokens,
    in_features,
    out_features,
    block_rows,
    nnz_blocks,
    stride_token,
    stride_feature,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STRIPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WHOLE_COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """All tiles, `GROUP` token tiles at a time so that their part of x stays in L2, block rows in the order given.

    Programs take tiles in turn, or with STRIPS each a stretch of them: with GROUP 1 these are block rows of the same
    tokens, whose x then comes from the L1 cache but once.

    Shapes: x [readable_tokens, in_features] by its two strides, of which `tokens` count; weight [nnz_blocks, ROWS,
    COLS], row_order [block_rows], residual and y [tokens, out_features] contiguous. CONTIGUOUS: features of x that
    surely lie side by side. Indices that break the format's rules give wrong outputs and nothing worse.
    """
    block_cols = tl.cdiv(in_features, COLS)
    token_tiles = tl.cdiv(tokens, BLOCK_M)
    tiles = token_tiles * block_rows
    begin = tl.program_id(0)
    end = tiles
    step = tl.num_programs(0)
    if STRIPS:
        end = ((begin + 1).to(tl.int64) * tiles // step).to(tl.int32)
        begin = (begin.to(tl.int64) * tiles // step).to(tl.int32)
        step = 1
    for tile in range(begin, end, step):
        first = tile // (GROUP * block_rows) * GROUP
        size = tl.minimum(token_tiles - first, GROUP)
        within = tile % (GROUP * block_rows)
        row = tl.load(row_order + within // size)
        m = (first + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
        start = tl.minimum(tl.maximum(tl.load(crow_indices + row), 0), nnz_blocks)
        stop = tl.minimum(tl.maximum(tl.load(crow_indices + row + 1), start), nnz_blocks)
        kept = (stop - start) * COLS  # features
        cols = col_indices + start
        blocks = weight + start.to(tl.int64) * (COLS * ROWS)
        x_rows = x + m.to(tl.int64)[:, None] * stride_token
        offset_k = tl.arange(0, BLOCK_K)
        offset_n = tl.arange(0, ROWS)
        acc = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)
        col = tl.load(cols + offset_k // COLS, mask=offset_k < kept, other=0)
        for start_k in range(0, kept, BLOCK_K):
            k = start_k + offset_k
            feature = tl.max_contiguous(tl.multiple_of(col * COLS + k % COLS, CONTIGUOUS), CONTIGUOUS)
            wanted = k < kept
            there = wanted & (col >= 0) & (col < block_cols)
            if not WHOLE_COLS:
                there = there & (feature < in_features)
            x_tile = tl.load(
                x_rows + feature.to(tl.int64)[None, :] * stride_feature,
                mask=(m < readable_tokens)[:, None] & there[None, :],
                other=0.0,
            )
            place_k = k // COLS * (ROWS * COLS) + k % COLS  # of the feature's first weight
            w_tile = tl.load(blocks + place_k[:, None] + offset_n[None, :] * COLS, mask=wanted[:, None], other=0.0)
            # The next blocks' places are on their way while these are multiplied.
            col = tl.load(cols + (k + BLOCK_K) // COLS, mask=k + BLOCK_K < kept, other=0)
            if WIDEN:
                x_tile = x_tile.to(tl.float32)
                w_tile = w_tile.to(tl.float32)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        n = row * ROWS + offset_n
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
        acc = _activated(acc, ACTIVATION)
        place = m.to(tl.int64)[:, None] * out_features + n[None, :]
        inside = (m < tokens)[:, None] & (n < out_features)[None, :]
        if HAS_RESIDUAL:
            acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)


ALIGNMENT = 16  # of sizes and addresses that the compiler may rely on


def k_major(x: Tensor) -> Tensor:
    """x [tokens, in_features] as a view of a transposed copy, with tokens filled up to a multiple of 16."""
    return F.pad(x.t(), (0, -len(x) % ALIGNMENT)).t()


def launch(
    x: Tensor, tokens: int, layer: LayerArguments, orders: RowOrders, *, config: Config, precision: str
) -> Tensor:
    """Run the kernel: [tokens, out_features].

    Args:
        x: [tokens or more, in_features], one of its strides 1.
        tokens: those that count.
        layer: all of its tensors contiguous.
        orders: of its block rows.
        config: how.
        precision: "ieee" or "tf32", of products in float32.
    """
    in_features, out_features = x.shape[1], layer.out_features
    rows, cols = layer.weight.shape[1:]
    y = x.new_empty(tokens, out_features)
    block_rows = len(orders.longest_first)
    tiles = triton.cdiv(tokens, config.block_m) * block_rows
    programs = min(tiles, config.per_sm * multiprocessors(x.device) or tiles)
    if not programs:
        return y
    constants = {
        "ROWS": rows,
        "COLS": cols,
        "CONTIGUOUS": _contiguous(x, cols, config),
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "STRIPS": config.strips,
        "ACTIVATION": layer.activation,
        "HAS_BIAS": layer.bias is not None,
        "HAS_RESIDUAL": layer.residual is not None,
        "WHOLE_COLS": in_features % cols == 0,
        "PRECISION": precision,
        "WIDEN": INTERPRETED and x.dtype == torch.bfloat16,  # whose products the interpreter does not know
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    with torch.cuda.device_of(x):
        _started(programs)(
            x,
            layer.weight,
            layer.crow_indices,
            layer.col_indices,
            orders.in_order if config.strips else orders.longest_first,
            layer.bias,
            layer.residual,
            y,
            tokens,
            len(x),
            in_features,
            out_features,
            block_rows,
            len(layer.weight),
            *x.stride(),
            **constants,
        )
    return y


def _started(programs: int) -> Callable[..., object]:
    """Runs so many programs of the kernel; takes options of the compiler too, beside the kernel's arguments."""
    return block_sparse_linear_kernel[(programs,)]


def _contiguous(x: Tensor, cols: int, config: Config) -> int:
    """How many features of a block the kernel may take to lie side by side in x."""
    if x.stride(1) != 1:
        return 1
    most = min(cols & -cols, config.block_k)
    # Copies of 16 bytes pass the L1 cache by, those of 8 do not.
    return min(most, 8 // x.element_size()) if config.strips else most


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few where the interpreter takes its place."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


INTERPRETED = not isinstance(block_sparse_linear_kernel, triton.JITFunction)  # by TRITON_INTERPRET=1, on the CPU
