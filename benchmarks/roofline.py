"""Draw docs/roofline.png: what limits the GPU kernel's tiles on an H100, from the sizes of tiles alone.

    python benchmarks/roofline.py

Nothing in the picture was measured. Peaks are NVIDIA's for the H100 SXM (data sheet, 2023): 989 TFLOP/s in bfloat16
without sparsity, 3.35 TB/s of device memory.
"""

from pathlib import Path

import _root  # noqa: F401
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

PEAK, MEMORY = 989e12, 3.35e12
TILES = ((64, 16), (128, 16), (128, 32), (128, 64), (256, 64), (128, 128))  # tokens x outputs
ELEMENT_BYTES = 2
PICTURE = Path(__file__).parents[1] / "docs" / "roofline.png"


def intensity(tokens: int, outputs: int) -> float:
    """FLOPs of a tile for each byte of x and of the weight that it reads, whatever it keeps."""
    return 2 * tokens * outputs / (ELEMENT_BYTES * (tokens + outputs))


def main() -> None:
    """Write the picture."""
    figure, axis = pyplot.subplots(figsize=(7.5, 4.2))
    x = np.logspace(0, 3.2, 200)
    axis.plot(x, np.minimum(PEAK, MEMORY * x) / 1e12, color="black", label="device memory, 3.35 TB/s")
    for bandwidth in (6e12, 12e12):
        roof = np.minimum(PEAK, bandwidth * x) / 1e12
        axis.plot(x, roof, "--", color="grey", linewidth=1, label=f"a cache of {bandwidth / 1e12:.0f} TB/s")
    for tokens, outputs in TILES:
        place = intensity(tokens, outputs)
        axis.axvline(place, color="tab:blue", linewidth=1)
        axis.text(place, 6, f" {tokens}x{outputs}", rotation=90, va="bottom", ha="right", color="tab:blue", fontsize=8)
    axis.set(xscale="log", yscale="log", xlim=(5, 1000), ylim=(5, 1500))
    axis.set(xlabel="FLOPs for each byte a tile reads", ylabel="TFLOP/s", title="Tiles of tokens x outputs, bfloat16")
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(PICTURE, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
