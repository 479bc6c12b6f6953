"""Energy counters: RAPL's files, and what is made of a counter's readings."""

import time

import pytest

from hf_blockprune.measure.energy import Energy, energy_counter, measure_energy, rapl_counter


def package(root, name, energy, limit=999_999):
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / "energy_uj"


def test_rapl_adds_packages_and_leaves_their_parts_out(tmp_path):
    first, second = package(tmp_path, "intel-rapl:0", 100_000), package(tmp_path, "intel-rapl:1", 500_000)
    part = package(tmp_path, "intel-rapl:0:0", 0)
    counter = rapl_counter(tmp_path)
    assert counter() == 0
    first.write_text("350000")
    second.write_text("600000")
    part.write_text("900000")
    assert counter() == pytest.approx(0.35)


def test_rapl_counters_that_start_again_go_on(tmp_path):
    file = package(tmp_path, "intel-rapl:0", 900_000)
    counter = rapl_counter(tmp_path)
    for value in (100_000, 800_000, 300_000):
        file.write_text(str(value))
        last = counter()
    assert last == pytest.approx(0.2 + 0.7 + 0.5)


@pytest.mark.parametrize("content", [None, "", "many"])
def test_where_nothing_can_be_read_there_is_no_counter(tmp_path, content):
    assert rapl_counter(tmp_path) is None
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    if content is not None:
        (folder / "energy_uj").write_text(content)
    assert rapl_counter(tmp_path) is None


def test_net_energy_leaves_idling_out():
    spent = 0.0

    def counter():  # a machine that idles at 100 W
        return 100 * time.perf_counter() + spent

    def run():  # and takes half a joule more for each call
        nonlocal spent
        spent += 0.5

    waits = []
    energy = measure_energy(run, counter, seconds=0.3, idle_seconds=0.2, wait=lambda: waits.append(1))
    assert energy.idle_watts == pytest.approx(100, rel=0.01)
    assert energy.mj_per_call() == pytest.approx(500, rel=0.01)
    assert energy.gross_joules == pytest.approx(100 * energy.seconds + 0.5 * energy.calls, rel=0.01)
    assert energy.seconds >= 0.3
    assert len(waits) >= 3


def test_power_and_gross_energy():
    energy = Energy(calls=10, seconds=2.0, gross_joules=300.0, idle_watts=50.0)
    assert (energy.net_joules, energy.watts) == (200.0, 150.0)
    assert (energy.mj_per_call(), energy.mj_per_call(net=False)) == (20_000.0, 30_000.0)


def test_this_machines_counter_counts_or_is_none():
    counter = energy_counter("cpu")
    if counter is not None:
        before = counter()
        time.sleep(0.05)
        assert counter() >= before
