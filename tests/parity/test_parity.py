"""Every case of docs/parity.md, computed anew: this trainer and TRL 1.16 on the same inputs. Oracle: TRL, in torch, beside it.

Needs the parity extra. `make parity` does the same and writes the page.
"""

from __future__ import annotations

import pytest

from scripts.parity.cases import Case, all_cases
from scripts.parity.results import Result, line
from scripts.parity.run import SEED, compare_all

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    pytest.importorskip("trl", reason="the parity extra is not installed")
    return {r.case.file: r for r in compare_all(tmp_path_factory.mktemp("parity") / "all", SEED)}


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.file)
def test_this_trainer_and_trl_give_the_same_numbers(case: Case, results: dict[str, Result]) -> None:
    result = results[case.file]
    assert result.holds, line(result)
    # TRL in another way is within the tolerances as well: they are no tighter than TRL is with itself.
    assert result.itself
