"""A profile of this machine from a minute of measurements: dense and block-sparse products, timed and fitted.

Every case runs once a round, so that what disturbs the machine disturbs all of them; times are medians over rounds.
Half of the cases are fitted to, by non-negative least squares in relative error, and the other half say how well that
predicts.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..display.stages import planned, stage
from ..errors import ModelError
from ..hub.blockprune_backends import available_backends
from ..hub.blockprune_cost import ELEMENT_BYTES, Linear, Profile
from ..hub.blockprune_linear import BlockSparseLinear
from ..hub.blockprune_ops import block_sparse_linear
from ..hub.blockprune_profiles import CpuProfile, GpuProfile
from .fit import fit_times, mape
from .stopwatch import milliseconds, share_done

SHAPES = tuple((out * width, by * width) for width in (192, 384, 768) for out, by in ((1, 1), (4, 1), (1, 4)))
BLOCK_SHAPES = ((64, 32), (32, 32), (16, 16))
DENSITIES = (0.2, 0.35, 0.5, 0.8)
TOKENS = {"cpu": (197, 788), "cuda": (197 * 16, 197 * 64)}
Case = tuple[Linear, Callable[[], Tensor], Callable[[], Tensor]]  # a layer, and its dense and its sparse product
FittedProfile: TypeAlias = CpuProfile | GpuProfile  # what is fitted to measurements
FASTEST = 1e9  # GB/s or FLOPs a cycle where a term has no part in the time


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of a layer, pruned and dense."""

    work: Linear
    dense_ms: float
    sparse_ms: float


def calibrate(
    device: str, *, seconds: float = 45.0, name: str | None = None
) -> tuple[FittedProfile, list[Measurement]]:
    """Measure this machine and fit a profile to it.

    Args:
        device: "cpu" or "cuda".
        seconds: about how long to measure.
        name: of the profile.

    Returns:
        The profile, with the mean relative error on cases that it was not fitted to, and all measurements.

    Raises:
        ModelError: no kernels for the device here.
    """
    backend = {"cpu": "cpu", "cuda": "triton"}[device]
    if backend not in available_backends() or (device == "cuda" and not torch.cuda.is_available()):
        raise ModelError(f"calibrate: no {backend} kernels here, so there is nothing to measure (see blockprune env)")
    with planned(("preparation", "measurement", "fit")):
        measured = measure(device, backend, seconds=seconds)
        base = blank_cpu(name or "this-cpu") if device == "cpu" else blank_gpu(name or "this-gpu")
        with stage("fit"):
            return fit_profile(base, measured), measured


def fit_profile(base: FittedProfile, measured: list[Measurement]) -> FittedProfile:
    """The profile with its rates fitted to every other measurement, and its error on the rest.

    Args:
        base: a `CpuProfile` or `GpuProfile` with the device's peaks.
        measured: in any order; it is shuffled, always the same way.
    """
    order = np.random.default_rng(0).permutation(len(measured))
    fitted_to, held_out = ([measured[i] for i in part] for part in (order[::2], order[1::2]))
    fitted = fit_cpu(base, fitted_to) if isinstance(base, CpuProfile) else fit_gpu(base, fitted_to)
    return replace(fitted, held_out_error=round(prediction_error(fitted, held_out), 4))


def prediction_error(profile: Profile, measured: list[Measurement]) -> float:
    """Mean relative error of the sparse latencies, and of the dense ones, together."""
    pairs = [(profile.sparse(m.work).latency_ms, m.sparse_ms) for m in measured]
    pairs += [(profile.dense(m.work).latency_ms, m.dense_ms) for m in measured]
    predicted, true = (np.array(values) for values in zip(*pairs, strict=True))
    return mape(predicted, true)


def rank_correlation(profile: Profile, measured: list[Measurement]) -> float:
    """Spearman's, of predicted and measured sparse latencies."""
    predicted = np.array([profile.sparse(m.work).latency_ms for m in measured])
    ranks = [values.argsort().argsort() for values in (predicted, np.array([m.sparse_ms for m in measured]))]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def fit_cpu(base: CpuProfile, measured: list[Measurement]) -> CpuProfile:
    """A processor's calls and rates; its peak is taken as given, and what was fitted are shares of it."""
    works = [m.work for m in measured]
    element = [ELEMENT_BYTES[work.dtype] for work in works]
    flops = np.array([work.flops for work in works])
    tall = np.array([work.block_shape[0] % 32 == 0 for work in works])
    moved = [
        np.array([size * work.tokens * work.in_features for size, work in zip(element, works, strict=True)]),
        np.array([size * work.tokens * work.out_features for size, work in zip(element, works, strict=True)]),
        np.array([work.weight_bytes for work in works]),
    ]
    terms = np.stack([np.ones(len(works)), flops * tall, flops * ~tall, *moved], axis=1)
    call, high, low, *rates = _fit(terms, np.array([m.sparse_ms for m in measured]))
    dense_terms = np.stack([np.ones(len(works)), [work._replace(mask=None).flops for work in works]], axis=1)
    dense_call, dense = _fit(dense_terms, np.array([m.dense_ms for m in measured]))
    peak = base.cores * base.ghz * 1e9 * base.flops_per_cycle
    efficiencies = [_rounded(1e3 / (slope * peak)) if slope else FASTEST for slope in (dense, high or low, low or high)]
    input_gb_s, output_gb_s, weight_gb_s = (_rounded(1e-6 / slope) if slope else FASTEST for slope in rates)
    return replace(
        base,
        dense_efficiency=efficiencies[0],
        sparse_efficiency_32=efficiencies[1],
        sparse_efficiency_16=efficiencies[2],
        dense_call_us=_rounded(max(1e3 * dense_call, 0.1)),
        sparse_call_us=_rounded(max(1e3 * call, 0.1)),
        input_gb_s=input_gb_s,
        output_gb_s=output_gb_s,
        weight_gb_s=weight_gb_s,
    )


def _fit(terms: np.ndarray, times: np.ndarray) -> list[float]:
    """Coefficients by `fit_times`, with terms scaled alike."""
    scale = np.maximum(terms.max(0), 1e-30)
    return (fit_times(terms / scale, times) / scale).tolist()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def fit_gpu(base: GpuProfile, measured: list[Measurement]) -> GpuProfile:
    """A GPU's launch and rates, one after the other, each at the value that predicts best.

    Times are a maximum of terms and so not linear in them; each round tries some values around the last best ones.
    """
    best, error = base, prediction_error(base, measured)
    step = 2.0
    while step > 1.01:
        for key in ("launch_us", "dense_efficiency", "sparse_efficiency", "l2_gb_s", "memory_efficiency"):
            for factor in (step, 1 / step):
                trial = replace(best, **{key: getattr(best, key) * factor})
                found = prediction_error(trial, measured)
                if found < error:
                    best, error = trial, found
        step = step**0.7
    return replace(best, **{key: _rounded(getattr(best, key)) for key in ("launch_us", "l2_gb_s")})


def measure(device: str, backend: str, *, seconds: float) -> list[Measurement]:
    """Time all cases by turns."""
    chosen = _chosen(device)
    with stage("preparation", len(chosen), unit="cases") as bar:
        cases = [_prepared(_case(device, backend, *case)) for case in bar.over(chosen)]
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    start, share = time.perf_counter(), 0.0
    with stage("measurement", seconds, unit="s", undisturbed=True) as bar:
        while share < 1:
            for (_, dense, sparse), found in zip(cases, times, strict=True):
                found.append((milliseconds(dense, device), milliseconds(sparse, device)))
            share = share_done(start, seconds, len(times[-1]), 1)
            bar.reach(share * seconds)
    return [
        Measurement(work, *(statistics.median(column) for column in zip(*found, strict=True)))
        for (work, _, _), found in zip(cases, times, strict=True)
    ]


def _prepared(case: Case) -> Case:
    """Runs it once: caches, packing, compilation."""
    _, dense, sparse = case
    dense()
    sparse()
    return case


def _chosen(device: str) -> list[tuple[int, tuple[int, int], tuple[int, int], float]]:
    """A third of all cases, spread over shapes, blocks and densities."""
    return list(product(TOKENS[device], SHAPES, BLOCK_SHAPES, DENSITIES))[::3]


def _case(
    device: str, backend: str, tokens: int, shape: tuple[int, int], block_shape: tuple[int, int], density: float
) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    outputs, inputs = shape
    grid = outputs // block_shape[0], inputs // block_shape[1]
    order = np.random.default_rng(0).permutation(grid[0] * grid[1]).reshape(grid)
    mask = order < max(1, round(density * order.size))
    linear = torch.nn.Linear(inputs, outputs, device=device, dtype=dtype).requires_grad_(False)
    layer = BlockSparseLinear.from_dense(linear, torch.from_numpy(mask), block_shape).requires_grad_(False)
    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    work = Linear(tokens, outputs, inputs, str(dtype).removeprefix("torch."), mask, block_shape)
    arguments = layer.weight, layer.crow_indices, layer.col_indices, layer.bias
    return (
        work,
        lambda: F.linear(x, linear.weight, linear.bias),
        lambda: block_sparse_linear(x, *arguments, out_features=outputs, backend=backend),
    )


def blank_cpu(name: str) -> CpuProfile:
    """This processor's peak; only its product with the fitted efficiencies matters."""
    flops = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 8)
    return CpuProfile(name, cores=torch.get_num_threads(), ghz=3.0, flops_per_cycle=flops)


def blank_gpu(name: str) -> GpuProfile:
    """The first GPU's multiprocessors and memory, with rates to be fitted."""
    found = torch.cuda.get_device_properties(0)
    return GpuProfile(
        name,
        sms=found.multi_processor_count,
        tflops={"bfloat16": 300, "float16": 300, "float32": 20},
        dram_gb_s=2000,
        l2_gb_s=5000,
        l2_mb=found.L2_cache_size / 2**20,
        power_limit_w=400,
        idle_w=50,
    )
