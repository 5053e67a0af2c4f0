"""Corrections, spans and ratings of texts as their authors publish them, on small hand-made files."""

from __future__ import annotations

import io
import tarfile
import tracemalloc

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.formats import texts
from rlaif_jax.feedback.records.forms import Correction, Span


def test_fine_grained(write):
    feedback = {
        "errors": [{"error type": "Redundant", "explanation": "twice", "start": 1, "end": 3}],
        "missing-info": [{"error type": "Missing-Answer", "passage_id": 1}],
        "corrected-prediction": "aXd",
    }
    row = {"question": "q", "passages": [["T", "s"]], "feedback": feedback, "preference": [0, 1, 2, 1, 1, 1]}
    row |= {f"prediction {i + 1}": text for i, text in enumerate(("abcd", "two", "three", "four"))}
    broken = row | {
        "preference": [9, 0, 0, 0, 0, 0],
        "feedback": feedback | {"errors": [{"error type": "x", "start": 3, "end": 9}]},
    }
    path = write("f.jsonl", row, broken)
    good, bad = texts.read_fine_grained(path)
    first = good[:9]
    assert first[0] == Correction(
        prompt="q\n\nT\ns", answers=("abcd",), rater=texts.WORKER, edited="aXd", spans=(Span(1, 3, -1.0, "Redundant"),)
    )
    assert [(j.text, j.aspects, j.quote) for j in first[1:3]] == [
        ("twice", ("Redundant",), "bc"),
        ("Missing-Answer",) * 1 + (("Missing-Answer",), ""),
    ]
    assert [(j.answers, j.status) for j in first[3:6]] == [
        (("abcd", "two"), "tie"), (("abcd", "three"), "ok"), (("abcd", "four"), "ok")
    ]  # fmt: skip
    assert [j.ranks for j in first[4:6]] == [(1, 2), (2, 1)]
    assert len(good) == 14 and [m[len(str(path)) :] for m in bad] == [
        ":2: span 3 .. 9 does not lie in the answer of 4 characters",
        ":2: preference holds 9; 0 is a tie, 1 and 2 are the predictions",
    ]


def test_squality(write):
    def review(worker, rating, rank, *annotations):
        marks = [{"selection": s, "annotation": a} for s, a in annotations]
        scores = {
            f"{n}-{k}": v
            for n in ("correctness", "selection", "overall")
            for k, v in (("rating", rating), ("rank", rank))
        }
        return {"worker_id": worker, "annotations": marks} | scores

    marks = (("short story", ["why?"]), ("a", []), ("zzz", ["x"]))
    systems = {
        "bart": {"response": "a short\nstory", "reviews": [review("3", 10, 2, *marks)]},
        "human": {"response": "other", "reviews": [review("3", 101, 1)]},
    }  # fmt: skip
    path = write("s.jsonl", {"passage-id": "77", "questions": {"0": systems}})
    stories = write("t.jsonl", {"metadata": {"passage_id": "77"}, "questions": [{"question_text": "What happens?"}]})
    good, bad = texts.read_squality(path, stories)
    assert {j.prompt for j in good} == {"Story 77: What happens?"}
    assert texts.read_squality(path)[0][0].prompt == "Story 77: question 0"
    assert [(j.form, j.principle) for j in good] == [
        ("rating", "correctness"), ("rating", "selection"), ("rating", "overall"), ("comment", ""), ("correction", ""),
        ("ranking", "correctness"), ("ranking", "selection"), ("ranking", "overall"),
    ]  # fmt: skip
    assert (good[3].text, good[3].quote) == ("why?", "short\nstory")
    assert [(s.start, s.end) for s in good[4].spans] == [(2, 13), (0, 1)]
    assert good[7].ranks == (2, 1) and good[7].generators == ("bart", "human")
    assert [m[len(str(path)) :] for m in bad] == [
        ":1, question 0: the quoted words 'zzz' do not occur in the answer",
        ":1, question 0: value is 101.0, off the scale 0 .. 100",
    ]


def test_mlqe_post_edits_of_a_folder_and_an_archive(tmp_path):
    files = {
        "dev.src": "a b\nc\n",
        "dev.mt": "x y\nz\n",
        "dev.pe": "x\nz\n",
        "dev.hter": "0.5\nmuch\n",
        "dev.tags": "OK",
    }
    (tmp_path / "dev").mkdir()
    with tarfile.open(tmp_path / "dev.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            (tmp_path / "dev" / name).write_text(text)
            info = tarfile.TarInfo(f"en-de/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    good, bad = texts.read_mlqe_post_edits(tmp_path / "dev")
    assert [(j.prompt, j.answers, j.form) for j in good] == [
        ("a b", ("x y",), "correction"), ("a b", ("x y",), "rating"), ("c", ("z",), "correction")
    ]  # fmt: skip
    assert good[0].edited == "x" and good[1].value == 0.5 and good[1].rater.source == "rule"
    assert len(bad) == 1 and bad[0].startswith(f"{tmp_path}/dev/dev.hter:2: ")
    assert texts.read_mlqe_post_edits(tmp_path / "dev.tar.gz")[0] == good
    (tmp_path / "dev" / "dev.pe").write_text("x\n")
    good, bad = texts.read_mlqe_post_edits(tmp_path / "dev")
    assert len(good) == 2 and "the files differ in length" in bad[0]
    (tmp_path / "dev" / "dev.pe").unlink()
    with pytest.raises(UserError, match=r"no file \*.pe"):
        texts.read_mlqe_post_edits(tmp_path / "dev")
    with pytest.raises(UserError, match="cannot read"):
        texts.read_mlqe_post_edits(tmp_path / "dev" / "dev.src")


def test_mlqe_raters_are_told_apart_by_their_z_scores(tmp_path):
    """Three raters of planted means and deviations, in shuffled columns; each score is on its rater's line."""
    generator = np.random.default_rng(0)
    mean, deviation = np.array([70.123, 80.456, 95.789]), np.array([20.0, 7.5, 12.25]) * np.pi / 3
    lines, planted = ["index\toriginal\ttranslation\tscores\tmean\tz_scores\tz_mean\tmodel_scores"], []
    for row in range(60):
        who = generator.permutation(3)[: 2 + row % 2]
        scores = generator.integers(0, 101, len(who))
        zs = (scores - mean[who]) / deviation[who]
        planted += who.tolist()
        lines.append(f'{row}\tsay "{row}\tword {row}\t{scores.tolist()}\t0\t{zs.tolist()}\t0\t0')
    (tmp_path / "dev.ende.df.short.tsv").write_text("\n".join([*lines, "60\tx\ty\t[1, 2]\t0\t[0.5]\t0\t0"]))
    good, bad = texts.read_mlqe_ratings(tmp_path)
    assert len(bad) == 1 and "differ in number" in bad[0]
    assert len(good) == len(planted) and good[0].prompt == 'say "0'
    names = [j.rater.name for j in good]
    assert set(names) == {"dev/1", "dev/2", "dev/3"}
    assert len(set(zip(names, planted))) == 3  # one name a rater
    assert np.diff([names.count(f"dev/{i}") for i in (1, 2, 3)]).max() <= 0


def test_sixty_raters_of_20_000_scores_are_found_in_little_memory(tmp_path):
    """Every two points in one array took .36 GB at 4,000 points."""
    generator = np.random.default_rng(1)
    mean, deviation = generator.uniform(40, 70, 60), generator.uniform(5, 20, 60)
    who, scores = generator.integers(0, 60, 20_000), generator.integers(0, 101, 20_000)
    zs = (scores - mean[who]) / deviation[who]
    tracemalloc.start()
    found = np.array(texts._raters_of_lines(np.stack([scores, zs], 1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert len(set(zip(who.tolist(), found.tolist()))) == 60
    counts = np.bincount(found)
    assert counts[0] == 0 and (np.diff(counts[1:]) <= 0).all()


def test_xsum(write):
    head = "bbcid,system,summary,hallucination_type,hallucinated_span,hallucinated_span_start,hallucinated_span_end,worker_id"
    path = write(
        "h.csv", head,
        "1,m,a cat a cat,extrinsic,a cat,7,12,w0", "1,m,a cat a cat,intrinsic,cat,3,6,w0", "1,m,a cat a cat,NULL,NULL,-1,-1,w1",
        "1,m,a cat a cat,extrinsic,\\na cat,0,5,w2", "2,m,dog,extrinsic,bird,1,5,w0",
    )  # fmt: skip
    good, bad = texts.read_xsum_spans(path)
    assert [(j.rater.name, j.spans, j.edited) for j in good] == [
        ("w0", (Span(6, 11, -1.0, "extrinsic"), Span(2, 5, -1.0, "intrinsic")), None), ("w1", (), "a cat a cat"),
        ("w2", (Span(0, 5, -1.0, "extrinsic"),), None),
    ]  # fmt: skip
    assert bad == [
        f"{path}:6: the quoted words 'bird' do not occur in the answer"
    ]  # and no "nothing is wrong" of w0 on 2
    path = write(
        "f.csv", "bbcid,system,summary,is_factual,worker_id", "1,m,s,yes,w", "1,m,s,NULL,w", "1,m,s,no,v", "1,m,s,2,v"
    )
    good, bad = texts.read_xsum_factuality(path)
    assert [(j.status, j.rater.name) for j in good] == [("ok", "w"), ("abstained", "w"), ("ok", "v")]
    assert [good[0].value, good[2].value] == [1, 0] and bad == [f"{path}:5: is_factual is '2'; it is yes, no or NULL"]


def test_ilf(write):
    row = {"prompt": "def f():\n", "Feedback": "Return it.", "original_model_completion": "def f():\n  pass"}
    row |= {"unedited_annotator_completion": "def f():\n  return 1", "completion": "  return 2\r\n", "worker_id": None}
    path = write(
        "i.jsonl", row, row | {"unedited_annotator_completion": "new"}, row | {"original_model_completion": "x"}
    )
    good, bad = texts.read_ilf(path)
    assert [(j.form, j.answers) for j in good] == [("comment", ("  pass",)), ("correction", ("  pass",))] * 2
    assert good[0].text == "Return it." and good[1].edited == "  return 1" and good[3].edited == "  return 2\n"
    assert bad == [f"{path}:3: original_model_completion does not begin with the prompt"]
