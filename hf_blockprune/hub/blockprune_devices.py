"""The devices that the cost model knows by name: what `blockprune_profiles` takes, and where the numbers come from.

Plain values alone, so that whoever wants the names can run this file without waiting for torch. The class of a device's
kind in `blockprune_profiles` says what the keys are; what is left out here is as there.
"""

from typing import TypeAlias

DeviceSettings: TypeAlias = dict[str, str | float | dict[str, float]]
"""A device's kind, its name and numbers, and of some numbers one for each dtype."""


def _generic_array(side: int) -> DeviceSettings:
    """A generic array of side x side multiply-add elements at 1 GHz with float16 numbers, outputs stationary, folds
    overlapped, and one DDR4-3200 channel pair (51.2 GB/s).

    Energy: Jouppi et al., ISCA 2021, table 2 (7 nm): fp16 multiply with fp32 add 0.72 pJ, 32 KB SRAM 8.5 pJ and DDR4
    1300 pJ for 64 bits.
    """
    return {
        "kind": "systolic",
        "name": f"systolic-{side}",
        "rows": side,
        "cols": side,
        "ghz": 1.0,
        "dram_gb_s": 51.2,
        "dataflow": "os",
        "overlap": True,
        "pj_per_mac": 0.72,
        "pj_per_sram_byte": 1.0625,
        "pj_per_dram_byte": 162.5,
        "source": "generic; Jouppi et al., ISCA 2021",
    }


DEVICES: dict[str, DeviceSettings] = {
    # NVIDIA A100 80GB SXM data sheet (2021): 108 multiprocessors, 312 TFLOP/s bfloat16 without sparsity, 19.5 TFLOP/s
    # float32, 2.04 TB/s, 40 MB L2, 400 W. Energy: Jouppi et al., ISCA 2021, table 2 (7 nm). l2_gb_s, idle_w and the
    # efficiencies are assumptions until fitted on one.
    "a100-sxm": {
        "kind": "gpu",
        "name": "a100-sxm",
        "sms": 108,
        "tflops": {"bfloat16": 312, "float16": 312, "float32": 19.5},
        "dram_gb_s": 2039,
        "l2_gb_s": 4000,
        "l2_mb": 40,
        "power_limit_w": 400,
        "idle_w": 55,
        "source": "NVIDIA A100 data sheet; Jouppi et al., ISCA 2021; not fitted",
    },
    # Two cores with AVX2 and FMA: two 256-bit units make 32 single-precision FLOPs a cycle (Intel and AMD optimisation
    # manuals). Clock and rates are those of a common server core; `blockprune calibrate` measures yours. Energy:
    # float32 multiply-add 1.69 pJ and DDR4 1300 pJ for 64 bits, Jouppi et al., ISCA 2021, table 2 (7 nm).
    "cpu-avx2": {
        "kind": "cpu",
        "name": "cpu-avx2",
        "cores": 2,
        "ghz": 3.0,
        "flops_per_cycle": 32,
        "source": "vendors' optimisation manuals; Jouppi et al., ISCA 2021; not fitted",
    },
    # Two cores with AVX-512, measured by `blockprune calibrate`; two 512-bit units make 64 single-precision FLOPs a
    # cycle (Intel and AMD optimisation manuals), and the efficiencies are shares of that at a nominal 3 GHz. Energy:
    # float32 multiply-add 1.69 pJ and DDR4 1300 pJ for 64 bits, Jouppi et al., ISCA 2021, table 2 (7 nm).
    "cpu-avx512": {
        "kind": "cpu",
        "name": "cpu-avx512",
        "cores": 2,
        "ghz": 3.0,
        "flops_per_cycle": 64,
        "dense_efficiency": 0.4491,
        "sparse_efficiency_32": 0.5675,
        "sparse_efficiency_16": 0.5295,
        "dense_call_us": 78.97,
        "sparse_call_us": 79.6,
        "input_gb_s": 4.344,
        "output_gb_s": 9.173,
        "weight_gb_s": 16.63,
        "dram_gb_s": 20.0,
        "idle_w": 0.0,
        "pj_per_mac": 1.69,
        "pj_per_byte": 20.3125,
        "held_out_error": 0.0719,
        "source": "measured by blockprune calibrate on AMD EPYC (AVX512), 2 threads, torch 2.13.0+cpu",
    },
    # NVIDIA H100 SXM data sheet (2023): 132 multiprocessors, 989 TFLOP/s bfloat16 without sparsity, 67 TFLOP/s
    # float32, 3.35 TB/s, 50 MB L2, 700 W. Energy per multiplication and byte: Jouppi et al., ISCA 2021, table 2 (7 nm;
    # for the 5 nm of this chip no table with a source was found). l2_gb_s, idle_w and the efficiencies are assumptions
    # until fitted on one.
    "h100-sxm": {
        "kind": "gpu",
        "name": "h100-sxm",
        "sms": 132,
        "tflops": {"bfloat16": 989, "float16": 989, "float32": 67},
        "dram_gb_s": 3350,
        "l2_gb_s": 5500,
        "l2_mb": 50,
        "power_limit_w": 700,
        "idle_w": 70,
        "source": "NVIDIA H100 data sheet; Jouppi et al., ISCA 2021; not fitted",
    },
    # NVIDIA GeForce RTX 4090 (Ada architecture white paper, 2022): 128 multiprocessors, 165 TFLOP/s bfloat16 with
    # float32 sums, without sparsity, 82.6 TFLOP/s float32, 1008 GB/s, 72 MB L2, 450 W. Energy: Jouppi et al., ISCA
    # 2021, table 2 (7 nm). l2_gb_s, idle_w and the efficiencies are assumptions until fitted on one.
    "rtx4090": {
        "kind": "gpu",
        "name": "rtx4090",
        "sms": 128,
        "tflops": {"bfloat16": 165, "float16": 165, "float32": 82.6},
        "dram_gb_s": 1008,
        "l2_gb_s": 4500,
        "l2_mb": 72,
        "power_limit_w": 450,
        "idle_w": 25,
        "source": "NVIDIA Ada white paper; Jouppi et al., ISCA 2021; not fitted",
    },
    **{f"systolic-{side}": _generic_array(side) for side in (16, 32, 64)},
    # The size of the ViTCoD accelerator (HPCA 2023, arXiv 2210.09573) as its public simulator states it (GATECH-
    # EIC/ViTCoD, Hardware/Simulator): 64 x 64 elements at 500 MHz, 76.8 GB/s. Modelled as an output-stationary array
    # here, which its engines for sparse attention are not. Energy: Jouppi et al., ISCA 2021, table 2.
    "vitcod": {
        "kind": "systolic",
        "name": "vitcod",
        "rows": 64,
        "cols": 64,
        "ghz": 0.5,
        "dram_gb_s": 76.8,
        "dataflow": "os",
        "overlap": True,
        "pj_per_mac": 0.72,
        "pj_per_sram_byte": 1.0625,
        "pj_per_dram_byte": 162.5,
        "source": "arXiv 2210.09573 and its simulator; Jouppi et al., ISCA 2021",
    },
}
