# SPDX-License-Identifier: Apache-2.0
"""Energy is what counters say, or not measurable; there are no estimates."""

import pytest

from prompt_tuning.training import energy

NO_COUNTER = {
    "joules": None,
    "of": [],
    "why": "not measurable here: no counter of energy can be read",
}


@pytest.fixture
def counters(tmp_path):
    """Two processors as Linux shows them; a function that sets their microjoules."""
    pytest.importorskip("codecarbon")
    root = tmp_path / "powercap"
    names = ("intel-rapl:0", "intel-rapl:1")
    for number, name in enumerate(names):
        folder = root / "intel-rapl" / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"package-{number}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")

    def set_to(*microjoules):
        for name, value in zip(names, microjoules, strict=True):
            (root / "intel-rapl" / name / "energy_uj").write_text(f"{value}\n")

    (root / "subsystem").mkdir()
    set_to(1_000_000, 70_000_000)
    return root / "subsystem", set_to


def test_counters_of_all_processors_are_added_up(counters):
    folder, set_to = counters
    with energy.EnergyMeter(str(folder)) as meter:
        assert meter.read()["joules"] == pytest.approx(0)
        set_to(4_000_000, 71_000_000)
        assert meter.read()["joules"] == pytest.approx(3 + 1)
        set_to(5_000_000, 71_500_000)
        found = meter.read()
    assert found["joules"] == pytest.approx(4 + 1.5)
    assert found["of"] == ["processors"]


def test_a_counter_that_goes_round(counters):
    folder, set_to = counters
    with energy.EnergyMeter(str(folder)) as meter:
        set_to(500_000, 70_000_000)
        assert meter.read()["joules"] == pytest.approx(262_143.32885 - 0.5, rel=1e-6)


def test_without_counters_nothing_is_guessed(tmp_path):
    pytest.importorskip("codecarbon")
    with energy.EnergyMeter(str(tmp_path / "none")) as meter:
        assert meter.read() == NO_COUNTER


def test_sums_of_unlike_parts_are_unknown():
    part = {"joules": 1.0, "of": ["processors"]}
    assert energy.total(part, NO_COUNTER)["joules"] is None
    other = energy.total(part, {"joules": 1.0, "of": ["GPUs"]})
    assert other["joules"] is None and "not measurable here" in other["why"]
