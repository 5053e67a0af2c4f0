"""The readers on the published files: counts against the raw files, read here in a few lines each."""

from __future__ import annotations

import csv
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif_jax.feedback.records.formats import judges, pairs, texts, tools
from rlaif_jax.feedback.records.formats.rows import ReadResult, chosen
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rating, to_json
from rlaif_jax.feedback.records.parsing import from_json

Data = Callable[[str], Path]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def forms(found: ReadResult) -> dict[tuple[str, str], int]:
    """Records by form and status, after a round through JSON; there are no messages."""
    good, bad = found
    assert bad == []
    assert all(from_json(to_json(judgement)).id == judgement.id for judgement in good[::97])
    return dict(Counter((judgement.form, judgement.status) for judgement in good))


def test_hh(shared_data: Data):
    path = shared_data("hh_harmless/test.jsonl")
    good, bad = pairs.read_hh(path)
    raw = lines(path)
    assert bad == [] and len(good) == len(raw) == 1838
    for judgement, row in zip(good, raw):
        assert judgement.prompt + judgement.answers[0] == row["chosen"] and judgement.ranks == (1, 2)
        assert judgement.prompt + judgement.answers[1] == row["rejected"] and judgement.prompt.endswith(
            "\n\nAssistant:"
        )
    assert sum(any(not answer.strip() for answer in j.answers) for j in good) == 4


def test_hh_written_again_is_the_same_file(shared_data: Data, tmp_path: Path):
    path = shared_data("hh_harmless/test.jsonl")
    assert pairs.write_hh(pairs.read_hh(path)[0], tmp_path / "hh") == 1838
    assert lines(tmp_path / "hh") == lines(path)


def test_oasst(shared_data: Data):
    path = shared_data("oasst/en_100_tree.jsonl")
    stack, ranked, replies = [row["prompt"] for row in lines(path)], 0, 0
    while stack:
        node = stack.pop()
        placed = [reply for reply in node["replies"] if reply.get("rank") is not None]
        ranked += len(placed) >= 2
        replies += len(placed) if len(placed) >= 2 else 0
        stack += node["replies"]
    good, bad = pairs.read_oasst(path)
    assert bad == [] and len(good) == ranked == 168
    assert sum(rank is not None for j in good for rank in j.ranks) == replies


def test_pandalm(shared_data: Data):
    path = shared_data("pandalm/testset-v1.jsonl")
    files = [shared_data(f"pandalm/{name}-testset-v1.jsonl") for name in ("gpt-3.5-turbo", "pandalm-7b")]
    found = judges.read_pandalm(path, files)
    votes = Counter(row[f"annotator{i}"] for row in lines(path) for i in (1, 2, 3))
    results = Counter(str(row[f"{n}_result"]) for file, n in zip(files, ("gpt", "pandalm")) for row in lines(file))
    assert sum(results.values()) == 2 * 785 and results["garbage"] == 17
    ties = votes[0] + results["0"] + results["Tie"]
    unread = {("ranking", "unparsed"): results["garbage"], ("ranking", "tie"): ties}
    assert forms(found) == unread | {("ranking", "ok"): 5 * 785 - ties - results["garbage"]}
    first = Counter(chosen(j) for j in found[0] if j.answered)
    assert first == {0: votes[1] + results["1"], 1: votes[2] + results["2"], None: ties}


@pytest.mark.parametrize("model", ["GPT-4", "ChatGPT", "LLaMA2", "Falcon"])
@pytest.mark.parametrize("way", ["Vanilla", "CoT", "Rating"])
def test_llmbar_judges(shared_data: Data, model: str, way: str):
    if (model, way) in (("LLaMA2", "Rating"), ("Falcon", "Rating")):
        pytest.skip("not published")
    path = shared_data(f"llmbar_judges/Natural.{model}.{way}.json")
    raw = [row["results"][0] for row in json.loads(path.read_text())]
    good, bad = judges.read_llmbar_judge(path, model)
    assert bad == [] and len(good) == 200
    if way == "Rating":
        assert [str(int(j.value)) for j in good] == [r[f"score_{i}"][0] for r in raw for i in (1, 2)]
        return
    winners = [r[f"swap = {swap}"]["winner"] for r in raw for swap in (False, True)]
    assert [{None: None, 0: "1", 1: "2"}[chosen(j)] for j in good] == winners
    assert [j.raw for j in good] == [r[f"swap = {swap}"]["completion"][0] for r in raw for swap in (False, True)]
    assert {j.shown for j in good[::2]} == {(0, 1)} and {j.shown for j in good[1::2]} == {(1, 0)}


def test_llmbar_gold_is_of_the_judged_pairs(shared_data: Data):
    gold, bad = judges.read_llmbar(shared_data("llmbar/LLMBar_Natural.json"))
    assert bad == [] and len(gold) == 100
    judged, _ = judges.read_llmbar_judge(shared_data("llmbar_judges/Natural.GPT-4.Vanilla.json"), "GPT-4")
    assert {j.item for j in gold} == {j.item for j in judged}


def test_prometheus(shared_data: Data):
    path = shared_data("prometheus/vicuna_eval.json")
    raw = json.loads(path.read_text())
    found = judges.read_prometheus(path)
    assert forms(found) == {("rating", "ok"): 960, ("comment", "ok"): 960}
    ratings = [j for j in found[0] if isinstance(j, Rating)]
    assert [j.value for j in ratings] == [score for row in raw for score in row["gpt4_score"]]
    assert [j.text for j in found[0] if isinstance(j, Comment)] == [
        text for row in raw for text in row["gpt4_feedback"]
    ]
    assert all(
        j.prompt in row["instruction"] and j.answers[0] in row["instruction"] for j, row in zip(ratings[::3], raw)
    )
    assert all("###" not in j.prompt + j.answers[0] and j.principle.startswith(("Does", "Is", "How")) for j in ratings)
    assert len({j.item for j in ratings}) == 320


def test_autoj(shared_data: Data):
    path = shared_data("prometheus/autoj_pairwise.jsonl")
    assert [chosen(j) for j in judges.read_autoj_pairs(path)[0]] == [
        None if row["label"] == 2 else row["label"] for row in lines(path)
    ]


def test_get_another_label(shared_data: Data):
    path = shared_data("get_another_label/BarzanMozafari_labels.txt")
    gold = shared_data("get_another_label/BarzanMozafari_evaluation.txt")
    good, bad = tools.read_get_another_label(path, gold=gold)
    raw = [line.split("\t") for line in path.read_text().splitlines()]
    assert bad == [] and len(good) == 5000 + 1000
    assert [(j.rater.name, j.prompt, j.answers[chosen(j)]) for j in good[:5000]] == [tuple(row) for row in raw]
    assert len({j.rater.name for j in good[:5000]}) == 83 and {j.rater.name for j in good[5000:]} == {"gold"}


def test_fine_grained(shared_data: Data):
    path = shared_data("fine_grained_rlhf/dev_feedback.jsonl")
    raw = lines(path)
    found = texts.read_fine_grained(path)
    errors = [error for row in raw for error in row["feedback"]["errors"]]
    ties = sum(vote == 0 for row in raw for vote in row["preference"])
    comments = sum(bool(e["explanation"].strip()) for e in errors) + sum(
        bool(r["feedback"]["missing-info"]) for r in raw
    )
    assert forms(found) == {
        ("correction", "ok"): 405,
        ("ranking", "tie"): ties,
        ("ranking", "ok"): 405 * 6 - ties,
        ("comment", "ok"): comments,
    }
    spans = [span for j in found[0] if isinstance(j, Correction) for span in j.spans]
    assert [(s.start, s.end, s.category) for s in spans] == [(e["start"], e["end"], e["error type"]) for e in errors]


def test_squality(shared_data: Data):
    path = shared_data("squality/all-responses.jsonl")
    good, bad = texts.read_squality(path, shared_data("squality/v1-3_txt_dev.jsonl"))
    reviews = [r for row in lines(path) for q in row["questions"].values() for s in q.values() for r in s["reviews"]]
    marks = [mark for review in reviews for mark in review["annotations"]]
    blank = [mark for mark in marks if not mark["selection"].strip()]
    again = [s["response"].count(mark["selection"]) > 1 for row in lines(path) for q in row["questions"].values()
             for s in q.values() for r in s["reviews"] for mark in r["annotations"] if mark["selection"].strip()]  # fmt: skip
    places = texts.read_squality(path).unused["later place of the words of a highlight, which is put at the first"]
    assert places == sum(again) > 200
    assert len(bad) == len(blank) == 5 and all("the quoted words are empty" in message for message in bad)
    assert len([j for j in good if isinstance(j, Rating)]) == 3 * len(reviews) == 2160
    assert len([j for j in good if isinstance(j, Ranking)]) == len(reviews) == 720
    spans = [span for j in good if isinstance(j, Correction) for span in j.spans]
    assert len(spans) == len(marks) - len(blank) == 2499
    remarks = [mark for mark in marks if " ".join(mark["annotation"]).strip() and mark not in blank]
    assert len([j for j in good if isinstance(j, Comment)]) == len(remarks)


def test_mlqe_post_edits(shared_data: Data):
    path = shared_data("mlqe_pe/pe.en-de-dev.tar.gz")
    with tarfile.open(path) as archive:
        raw = {
            m.name[-4:]: archive.extractfile(m).read().decode().splitlines() for m in archive.getmembers() if m.isfile()
        }
    found = texts.read_mlqe_post_edits(path)
    assert forms(found) == {("correction", "ok"): 1000, ("rating", "ok"): 1000}
    edits = found[0][::2]
    assert [j.prompt for j in edits] == raw[".src"] and [j.answers[0] for j in edits] == raw["v.mt"]
    assert [j.edited for j in edits] == raw["v.pe"]
    assert [1 - j.value for j in found[0][1::2]] == pytest.approx([float(x) for x in raw["hter"]])


@pytest.mark.parametrize("split, ratings, raters", [("dev", 6000, 22), ("train", 22779, 25)])
def test_mlqe_ratings(shared_data: Data, split: str, ratings: int, raters: int):
    """The raters found by their lines are those that the file was made of: each one's z-scores have mean 0, deviation 1
    over the original, larger collection; here no score may lie on two lines, so each has one rater."""
    found = texts.read_mlqe_ratings(shared_data(f"mlqe_pe/da.en-de-{split}.tar.gz"))
    assert forms(found) == {("rating", "ok"): ratings}
    names = Counter(j.rater.name for j in found[0])
    assert len(names) == raters and f"{split}/0" not in names
    assert [names[f"{split}/{i}"] for i in range(1, raters + 1)] == sorted(names.values(), reverse=True)
    items = Counter(j.prompt for j in found[0])
    assert set(items.values()) <= {3, 6} | {6, 9, 12}  # a source sentence may come twice


def test_xsum(shared_data: Data):
    path = shared_data("xsum_hallucination/hallucination_annotations_xsum_summaries.csv")
    raw = list(csv.DictReader(path.read_text().splitlines()))
    found = texts.read_xsum_spans(path)
    groups = {(r["bbcid"], r["system"], r["worker_id"]) for r in raw}
    assert forms(found) == {("correction", "ok"): len(groups)}
    marked = {(r["bbcid"], r["system"], r["worker_id"]) for r in raw if r["hallucination_type"] != "NULL"}
    assert sum(bool(j.spans) for j in found[0]) == len(marked)
    # Where the file's own offsets, which count from 1, do hold the words, the spans are those, without blanks around.
    exact = {
        (r["bbcid"], r["worker_id"], start, start + len(r["hallucinated_span"]))
        for r in raw
        if (start := int(r["hallucinated_span_start"]) - 1) >= 0
        and r["hallucinated_span"] == r["hallucinated_span"].strip()
        and r["summary"][start:].startswith(r["hallucinated_span"])
    }
    spans = {(j.prompt.split()[1], j.rater.name, span.start, span.end) for j in found[0] for span in j.spans}
    assert len(exact) > 5000 and exact <= spans
    path = shared_data("xsum_hallucination/factuality_annotations_xsum_summaries.csv")
    facts = Counter(row["is_factual"] for row in csv.DictReader(path.read_text().splitlines()))
    assert forms(texts.read_xsum_factuality(path)) == {
        ("rating", "ok"): facts["yes"] + facts["no"],
        ("rating", "abstained"): facts["NULL"],
    }


def test_ilf(shared_data: Data):
    path = shared_data("ilf_code/surge_annotations.jsonl")
    found = texts.read_ilf(path)
    assert forms(found) == {("comment", "ok"): 149, ("correction", "ok"): 149}
    assert [j.text for j in found[0][::2]] == [row["Feedback"] for row in lines(path)]
    assert all(j.prompt not in j.edited and j.edited != j.answers[0] for j in found[0][1::2])


def test_mt_bench_questions_and_answers(shared_data: Data, tmp_path: Path):
    questions, answers = shared_data("mt_bench/question.jsonl"), shared_data("mt_bench/gpt-4.jsonl")
    known = {row["question_id"] for row in lines(answers)}
    scored = tmp_path / "scores.jsonl"
    scored.write_text("\n".join(json.dumps({"question_id": q, "model": "gpt-4", "score": 9}) for q in known))
    good, bad = judges.read_fastchat(scored, questions, [answers])
    assert bad == [] and len(good) == len(known) > 0
    turns = {row["question_id"]: row["turns"][0] for row in lines(questions)}
    assert {j.prompt for j in good} == {turns[q] for q in known} and all(j.answers != ("gpt-4",) for j in good)
