"""Closed forms against SCALE-Sim itself, where it is installed: `pip install '.[oracle]'`."""

import csv

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_blockprune.cost.systolic import dense_cycles

pytest.importorskip("scalesim", reason="SCALE-Sim is not installed; pip install '.[oracle]'")

CONFIG = """[general]
run_name = run
[architecture_presets]
ArrayHeight = {rows}
ArrayWidth = {cols}
ifmapsramszkB = 64
filtersramszkB = 64
ofmapsramszkB = 64
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Bandwidth = 1000
Dataflow = {dataflow}
ReadRequestBuffer = 64
WriteRequestBuffer = 64
[layout]
IfmapCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterCustomLayout = False
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


def scale_sim(folder, m, k, n, rows, cols, dataflow):
    """Total cycles, as SCALE-Sim reports them."""
    from scalesim.scale_sim import scalesim

    paths = {name: folder / name for name in ("array.cfg", "problem.csv", "layout.csv")}
    paths["array.cfg"].write_text(CONFIG.format(rows=rows, cols=cols, dataflow=dataflow))
    paths["problem.csv"].write_text(f"Layer, M, N, K,\nlayer, {m}, {n}, {k},\n")
    paths["layout.csv"].write_text("")
    config, topology, layout = (str(path) for path in paths.values())
    run = scalesim(True, False, config=config, topology=topology, layout=layout, input_type_gemm=True)
    run.run_scale(top_path=str(folder))
    with (folder / "run" / "COMPUTE_REPORT.csv").open() as file:
        return int(next(iter(csv.DictReader(file, skipinitialspace=True)))["Total Cycles"])


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(2, 16), st.integers(2, 16)),
    st.sampled_from(["ws", "os", "is"]),
)
def test_dense_cycles_are_those_of_scale_sim(tmp_path, problem, array, dataflow):
    rows, cols = array
    assert scale_sim(tmp_path, *problem, rows, cols, dataflow) == dense_cycles(
        *problem, rows=rows, cols=cols, dataflow=dataflow
    )
