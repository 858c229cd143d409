"""Cases of docs/parity.md, computed anew: this trainer and TRL 1.16 on the same inputs. Oracle: TRL, in torch, beside it.

Needs the parity extra. `make parity` computes every case and writes the page.
"""

from __future__ import annotations

import pytest

from scripts.parity.cases import Case, all_cases
from scripts.parity.results import Result, line
from scripts.parity.run import SEED, compare_all

# Left to `make parity`, as whole runs are dear: these are held to recorded runs of TRL (tests/run/test_run_trl.py), and to its schedules
# (test_optimizers.py).
RECORDED = ("Trajectories", "Schedules")
CASES = [case for case in all_cases() if case.area not in RECORDED]

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    pytest.importorskip("trl", reason="the parity extra is not installed")
    folder = tmp_path_factory.mktemp("parity") / "all"
    return {r.case.file: r for r in compare_all(folder, SEED, sorted({case.area for case in CASES}))}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_this_trainer_and_trl_give_the_same_numbers(case: Case, results: dict[str, Result]) -> None:
    result = results[case.file]
    assert result.holds, line(result)
    # TRL in another way is within the tolerances as well: they are no tighter than TRL is with itself.
    assert result.itself
