"""The GPU kernel compiled for GPUs that need not be there: what reaches tensor cores, and how memory is read."""

import json

import pytest

pytest.importorskip("triton")

from hf_blockprune.hub.blockprune_tuning import Problem, candidates
from tests.forking import ENVIRONMENT, Forks

# Compiles one variant to PTX and machine code and prints what is in it. In a process of its own, since the interpreter,
# once asked for, stays for a process's life.
COMPILE = r"""
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_blockprune.hub.blockprune_triton import block_sparse_linear_kernel as kernel

for line in open(sys.argv[1]):
    case = json.loads(line)
    constants = case["constants"]
    dtype = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[case["dtype"]]
    values, indices = ("x", "weight", "bias", "residual", "y"), ("crow_indices", "col_indices", "row_order")
    types = {name: dtype for name in values} | {name: "*i32" for name in indices}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {*values, *indices, *case["divisible"]}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned},
    )
    options = {"num_warps": case["warps"], "num_stages": case["stages"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", case["capability"], 32), options=options)
    ptx = compiled.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+),", ptx)
    print(json.dumps({
        "machine_code": len(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall("wgmma.mma_async", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "copies": sorted({int(size, 16) for size in copies}),
    }), flush=True)
"""
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


def variants(capability, dtype, rows, cols, tokens):
    """All that may be launched on a GPU for a layer of 3072 x 768."""
    element_bytes = 4 if dtype == "float32" else 2
    problem = Problem(dtype, element_bytes, "ieee", rows, cols, tokens, 3072, 768, 0.5)
    for config in candidates(problem, SHARED_MEMORY[capability]):
        contiguous = min(cols & -cols, config.block_k)
        if config.strips:
            contiguous = min(contiguous, 8 // element_bytes)
        constants = {
            "ROWS": rows,
            "COLS": cols,
            "CONTIGUOUS": 1 if config.k_major else contiguous,
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_k,
            "GROUP": config.group,
            "STRIPS": config.strips,
            "ACTIVATION": "gelu",
            "HAS_BIAS": True,
            "HAS_RESIDUAL": False,
            "WHOLE_COLS": True,
            "PRECISION": "ieee",
            "WIDEN": False,
            "stride_token" if config.k_major else "stride_feature": 1,
        }
        padded = ["readable_tokens", "stride_feature"] if config.k_major else ["stride_token"]
        yield (
            config,
            {
                "capability": capability,
                "dtype": dtype,
                "constants": constants,
                "divisible": ["in_features", "out_features", *padded],
                "warps": config.warps,
                "stages": config.stages,
            },
        )


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    """Starts processes that compile; whether Triton interprets is settled when it is imported."""
    cache = tmp_path_factory.mktemp("cache")
    with Forks(
        "import torch, triton", {**ENVIRONMENT, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    ) as forks:
        yield forks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "rows", "cols", "tokens"),
    [
        (80, "bfloat16", 16, 16, 12608),
        (86, "float32", 32, 32, 197),
        (90, "bfloat16", 64, 32, 12608),
        (90, "bfloat16", 128, 64, 197),
        (90, "float16", 64, 1, 197),
    ],
)
def test_candidates_compile_and_use_tensor_cores_and_wide_copies(
    compiling, tmp_path, capability, dtype, rows, cols, tokens
):
    cases = list(variants(capability, dtype, rows, cols, tokens))
    (tmp_path / "cases.jsonl").write_text("\n".join(json.dumps(case) for _, case in cases))
    process = compiling.run("-c", COMPILE, tmp_path / "cases.jsonl")
    assert process.returncode == 0, process.stderr[-2000:]
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(results) == len(cases)
    for (config, _), found in zip(cases, results, strict=True):
        assert found["machine_code"] > 0, config
        assert found["shared"] <= SHARED_MEMORY[capability], config
        if dtype != "float32":  # in full precision there are no tensor cores
            assert found["wgmma" if capability == 90 and config.block_m >= 64 else "mma"] > 0, config
        if config.k_major or cols >= 8:
            assert max(found["copies"]) == 16, config
            assert (8 in found["copies"]) >= (config.strips and not config.k_major), config
