"""Every number of a run has an explanation, which the page shows on hover and in its glossary."""

import json

import pytest

from rlaif_jax.report import glossary
from rlaif_jax.report.glossary import MAIN, label
from rlaif_jax.report.quantities import QUANTITIES
from rlaif_jax.report.story import CHECKS
from tests import tiny
from tests.helpers import unexplained
from tests.report.pages import make, write_json


@pytest.mark.parametrize(
    ("key", "title", "share"),
    [
        ("kl", "KL to the reference", False),
        ("gold_before", "Gold score (before)", False),
        ("win_rate_gold", "Win rate by gold", True),
        ("win_rate_gold_ci95", "Win rate by gold", True),
        ("win_rate_eval_reward", "Win rate by the reward", True),
        ("win_rate_my_judge_length_controlled", "Win rate by my judge, equal lengths", True),
        ("first/sampler_gap", "Sampler gap (first minibatch)", False),
        ("discriminator/accuracy", "Accuracy (discriminator)", True),
        ("grad_norm/policy", "Gradient norm, policy", False),
        ("score/1", "Score 1", False),
    ],
)
def test_a_key_finds_its_explanation(key, title, share):
    found = label(key)
    assert (found.title, found.share) == (title, share)
    assert found.meaning


@pytest.mark.parametrize("key", ["my_number", "kl_of_mine", "", "/", "win_rate", "first/mine", "<b>/x", "term-kl"])
def test_an_unknown_key_is_shown_by_its_words(key):
    found = label(key)
    assert (found.term, found.meaning) == ("", "")


def test_the_table_is_sound():
    ids = [glossary._id(key) for key in QUANTITIES]
    assert len(set(ids)) == len(ids)
    assert set(MAIN) <= set(QUANTITIES)
    for meaning in [quantity.meaning for quantity in QUANTITIES.values()] + list(CHECKS.values()):
        assert meaning[0].isupper()
        assert meaning.endswith(".")


def test_a_number_leads_to_its_explanation_by_mouse_and_by_keyboard(run):
    page = make(run)
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    hints = [value for tag, name, value in page.attributes if (tag, name) == ("a", "title")]
    entries = {value for tag, name, value in page.attributes if (tag, name) == ("div", "id")}
    assert "#term-kl" in links
    assert {link.removeprefix("#") for link in links} - {"warnings"} <= entries
    assert QUANTITIES["kl"].meaning in hints
    _, _, text = page.text.partition("Glossary")
    assert text.count(QUANTITIES["kl"].meaning) == 1
    assert QUANTITIES["dpo_loss"].meaning not in text, "only what this page has"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{a} b"}) + "\n" for a in "acde" * 4))
    config = tiny.TinyConfig(prompts=folder / "prompts.jsonl", out=folder / "run")
    tiny.main(config)
    return folder / "run"


def test_every_number_of_a_run_is_explained(tiny_run):
    assert unexplained(tiny_run) == []
    checks = json.loads((tiny_run / "summary.json").read_text())["checks"]
    assert set(checks) <= set(CHECKS)


def test_a_number_without_an_explanation_is_found(run):
    write_json(run, "summary.json", {"metrics": {"kl": 1.0, "brand_new": 2.0}})
    assert unexplained(run) == ["brand_new"]
