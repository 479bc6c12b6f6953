"""What a linear layer costs to run: FLOPs, bytes and energy, from its shape and kept blocks alone.

Energy constants: Jouppi et al., "Ten Lessons From Three Generations Shaped Google's TPUv4i", ISCA 2021, table 2
(7 nm): fp16 multiply with fp32 add 0.72 pJ; HBM2 access 250 to 450 pJ for 64 bits, of which the middle is taken.
"""

PJ_PER_MAC = 0.72
PJ_PER_BYTE_DRAM = 350.0 / 8
PJ_TO_MJ = 1e-9


def linear_flops(tokens: float, weights: float) -> float:
    """FLOPs of multiplying `tokens` rows by `weights` matrix entries (a multiply and an add each)."""
    return 2.0 * tokens * weights


def weights_energy_mj(tokens: float, weights: float, element_bytes: int = 2) -> float:
    """Energy in millijoules of one forward pass through `weights` kept entries: their MACs, and one fetch of each."""
    return (tokens * weights * PJ_PER_MAC + weights * element_bytes * PJ_PER_BYTE_DRAM) * PJ_TO_MJ
