"""The model card. Oracles: yaml reads the header; the numbers are those of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import report_runs as runs
import yaml

from jax_dpo.report.card import model_card

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def parts(text: str) -> tuple[dict[str, Any], str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_a_full_model() -> None:
    header, body = parts(model_card(runs.healthy(), HUB, license="apache-2.0"))
    assert header == {
        "base_model": HUB,
        "license": "apache-2.0",
        "library_name": "transformers",
        "tags": ["dpo", "jax-dpo"],
    }
    for line in (
        "| loss | 0.6931 | 0.5319 |",
        "| accuracy | no preference yet | 92.0 % |",
        "| reward margin | 0.0000 | +0.3535 |",
        "| KL to the reference, nats per token | 0.0000 | 0.0970 |",
        "| learning_rate | 5e-6 |",
        "Verdict: trained; all gates passed; exit 0.",
    ):
        assert line in body.splitlines(), line
    assert "its bound was 0.1" in body and "1,890 pairs of 1,908 rows" in body


def test_the_best_checkpoint_has_its_own_numbers() -> None:
    _, body = parts(model_card(runs.failing(), HUB, step=250))
    assert "the checkpoint of step 250" in body
    assert "| held-out pairs | step 0 | step 250 |" in body
    found = next(r for r in runs.failing() if r["kind"] == "eval" and r["step"] == 250)
    assert f"| KL to the reference, nats per token | 0.0000 | {found['eval_kl_divergence']:.4f} |" in body
    assert "Verdict" not in body
    assert "- step 450: rolled back from step 450 to step 250" in body


def test_an_adapter() -> None:
    start = runs.start()
    start["model"]["trainable_parameters"] = 921_600
    header, body = parts(model_card([start, *runs.healthy()[1:]], HUB))
    assert header["library_name"] == "peft" and "license" not in header
    assert "adapters only: 921.6 K of 134.5 M parameters (0.69 %)" in body
    assert "PeftModel.from_pretrained(base, '.')" in body and HUB in body


def test_a_local_base_is_named_without_its_path(tmp_path: Path) -> None:
    base = tmp_path / "my-model"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# A model\n")
    text = model_card(runs.healthy(), str(base))
    header, body = parts(text)
    assert "base_model" not in header and header["license"] == "mit"
    assert str(tmp_path) not in text and "# my-model, tuned" in body


def test_the_licence_of_the_record_is_used_and_a_broken_card_is_not() -> None:
    start = runs.start()
    start["model"]["license"] = "apache-2.0"
    assert parts(model_card([start], HUB))[0]["license"] == "apache-2.0"


def test_a_card_that_cannot_be_read_claims_no_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert "license" not in parts(model_card(runs.healthy(), str(tmp_path)))[0]


def test_without_an_evaluation_it_says_so() -> None:
    _, body = parts(model_card([runs.start(), runs.train(1)], HUB))
    assert "No evaluation set was given" in body


def test_text_stays_text() -> None:
    start = runs.start(reference="a | b\n# heading <b>*x*</b>")
    _, body = parts(model_card([start], "x/y: {z}"))
    assert "| reference | a \\| b # heading \\<b\\>\\*x\\*\\</b\\> |" in body
