"""What the experiment prints of the published data holds what the project claims of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

from experiments import feedback_real
from rlaif_jax.config import UserError
from rlaif_jax.feedback.judges.sentiment import SentimentConfig
from rlaif_jax.recipes import published
from tests.recipes.squality_file import turning, upwards, write_squality


@pytest.fixture
def data(shared_data):
    return shared_data("pandalm").parent


def found(data, measure, *files: str, **options) -> dict:
    """Name -> finding; of several with one name a list."""
    rows = list(measure(*(data / file for file in files), **options))
    names: dict = {}
    for row in rows:
        names.setdefault(row.name, []).append(row)
    return {name: same[0] if len(same) == 1 else same for name, same in names.items()}


def test_dawid_skene_beats_the_majority(data):
    names = (f"get_another_label/BarzanMozafari_{name}.txt" for name in ("labels", "evaluation"))
    rows = found(data, published.crowd_labels, *names)
    assert round(rows["majority vote"].value, 3) == 0.696
    assert round(rows["Dawid-Skene, three steps"].value, 3) == 0.709  # crowd-kit 1.4.1's DawidSkene, which stops there
    assert rows["Dawid-Skene, converged"].value >= 0.709
    assert rows["Dawid-Skene, workers pooled"].value >= 0.709


def test_word_edits_rank_like_hter(data):
    rows = found(data, published.post_edits, "mlqe_pe/pe.en-de-dev.tar.gz", seed=0)
    assert rows["Spearman with HTER"].value >= 0.98
    assert rows["equal to HTER"].value > 0.85


@pytest.mark.slow
def test_the_rating_model_ranks_better_than_raw_means(data):
    rows = found(data, published.ratings, "mlqe_pe/da.en-de-dev.tar.gz", seed=0)
    together, single = rows["gain of the model"]
    assert together.low > 0 and single.low > 0
    assert "by the 19 others" in together.note


def test_llmbar_judges_agree_with_themselves_as_often_as_the_files_say(data):
    rows = found(data, published.judge_in_both_orders, "llmbar/LLMBar_Natural.json", "llmbar_judges")
    assert len(rows) == 8
    for name, row in rows.items():
        model, way = name.partition(":")[0].split()
        raw = json.loads((data / "llmbar_judges" / f"Natural.{model}.{way}.json").read_text())
        results = [entry["results"][0] for entry in raw]
        winners = [(result["swap = False"]["winner"], result["swap = True"]["winner"]) for result in results]
        read = [(one, two) for one, two in winners if one is not None and two is not None]
        assert row.value == pytest.approx(sum(one == two for one, two in read) / len(read))
        unread = len(winners) - len(read)
        assert (f"{unread} of 100 pairs with an unread reply are left out" in row.note) == (unread > 0)
        assert float(row.note.partition("re-read alike ")[2].split(",")[0]) >= 0.99
    assert round(100 * rows["GPT-4 Vanilla: both orders agree"].value) == 95
    assert round(100 * rows["Falcon CoT: both orders agree"].value) == 14


def test_verdicts_are_read_from_the_last_one():
    assert published.preferred_output("Vanilla", "Output (b)") == 1
    assert published.preferred_output("CoT", "Output (a) is better ... no.\n\nTherefore, Output (b) is better.") == 1
    assert published.preferred_output("CoT", "both Output (a) and Output (b) are equally good") is None


def test_kappa_among_people_and_of_judges(data):
    files = [f"pandalm/{name}testset-v1.jsonl" for name in ("", "gpt-3.5-turbo-", "pandalm-7b-")]
    rows = found(data, published.people_and_judges, *files)
    people = [row for name, row in rows.items() if "annotator" in name]
    assert len(people) == 3 and all(0.84 < row.value < 0.9 and "of 785 pairs" in row.note for row in people)
    gpt, panda = rows["kappa of gpt and the majority"], rows["kappa of pandalm and the majority"]
    assert 0.4 < panda.value < gpt.value < 0.55 and gpt.low < gpt.value < gpt.high
    assert "of 768 pairs; 17 replies without a verdict" in gpt.note


@pytest.mark.slow
def test_the_sentiment_of_remarks_ranks_the_scores(data):
    measure = partial(
        published.remarks, sentiment=SentimentConfig(updates=150, max_words=96), reviews=data / "sentiment"
    )
    rows = found(data, measure, "prometheus/vicuna_eval.json", seed=0)
    assert rows["Spearman, learned from the other answers' remarks"].low > 0.6
    assert rows["Spearman, learned from film reviews"].low > 0.25


def test_workers_of_squality_agree_more_on_coverage_than_on_correctness(data):
    rows = found(data, published.summaries, "squality/all-responses.jsonl")
    correctness, selection, overall = rows["Krippendorff's alpha (interval)"]
    assert correctness.high < selection.low and 0.7 < overall.value < 0.85
    assert all(row.value > 0.75 for row in rows["two workers rank a pair alike"])


def test_alpha_is_krippendorffs(data):
    krippendorff = pytest.importorskip("krippendorff")
    raw = [json.loads(line) for line in (data / "squality/all-responses.jsonl").read_text().splitlines()]
    answers = [s for row in raw for question in row["questions"].values() for s in question.values()]
    table = [[None] * len(answers) for _ in range(9)]
    for column, answer in enumerate(answers):
        for review in answer["reviews"]:
            table[int(review["worker_id"])][column] = review["overall-rating"]
    table = [
        [float("nan") if value is None else value for value in row] for row in table if any(v is not None for v in row)
    ]
    alpha = krippendorff.alpha(reliability_data=table, level_of_measurement="interval")
    rows = found(data, published.summaries, "squality/all-responses.jsonl")
    assert rows["Krippendorff's alpha (interval)"][2].value == pytest.approx(alpha, abs=1e-9)


def test_what_is_not_there_is_skipped_and_said(tmp_path, capsys):
    with pytest.raises(UserError, match="there is no such folder"):
        feedback_real.main(feedback_real.RealConfig(data=tmp_path / "none"))
    assert feedback_real.main(feedback_real.RealConfig(data=tmp_path)) == {}
    assert "has no llmbar/LLMBar_Natural.json" in " ".join(capsys.readouterr().out.split())


def test_json(shared_data, tmp_path, capsys):
    shutil.copytree(shared_data("get_another_label"), tmp_path / "get_another_label")
    rows = feedback_real.main(feedback_real.RealConfig(data=tmp_path, json=True))
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == list(rows) == ["BarzanMozafari: 5,000 labels of 83 workers"]
    assert printed["BarzanMozafari: 5,000 labels of 83 workers"][0]["name"] == "majority vote"


def test_figures_do_not_depend_on_the_order_of_sets(tmp_path):
    write_squality(tmp_path, upwards, turning, lambda q: ((0, 1, 2), (1, 2, 0), (2, 0, 1))[q % 3])
    printed = [
        subprocess.run(
            [sys.executable, feedback_real.__file__, "--data", str(tmp_path), "--json"],
            env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
