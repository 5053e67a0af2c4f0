"""Template files: the project's format with its errors, and FastChat's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.api.replies import Reply
from rlaif_jax.feedback.api.template_files import read_template
from rlaif_jax.feedback.api.templates import Question
from rlaif_jax.feedback.api.verdicts import read_verdict

GOOD = """\
# mine
form: ranking
labels: A = first, B = second
verdict: [[{label}]]
max_tokens: 100

[system]
Judge {{fairly}}.
[user]
{prompt}
A: {answer_1}
B: {answer_2}
[reasons]
End with [[A]] or [[B]].
"""


def test_a_file_is_read_and_filled(tmp_path: Path):
    (tmp_path / "mine.txt").write_text(GOOD)
    template = read_template(tmp_path / "mine.txt")
    assert template.name == "mine" and template.labels == (("A", 1.0), ("B", 0.0)) and template.max_tokens == 100
    rendered = template.render(Question("{answer_1}?", ("x", "y")), (1, 0), ending="reasons")
    system, user = rendered.messages
    assert system == {"role": "system", "content": "Judge {fairly}."}
    # What a value holds is data: its braces are no placeholders.
    assert user["content"] == "{answer_1}?\nA: y\nB: x\nEnd with [[A]] or [[B]]."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("form: ranking", "form: duel", r"mine.txt:2: form is 'duel'; it is one of ranking, rating"),
        ("form: ranking\n", "", r"mine.txt: the line `form: .*` is missing"),
        ("A: {answer_1}", "A: {answer_a}", r"mine.txt:11: unknown placeholder \{answer_a\}; a ranking has answer_1"),
        ("A: {answer_1}", "A: answer_1", r"mine.txt: the placeholder \{answer_1\} is missing"),
        ("A: {answer_1}", "A: {answer_1", r"mine.txt:11: a lone \{; write \{\{"),
        ("labels: A = first, B = second", "labels: A = first, B = best", r"mine.txt:3: 'B = best' is no label"),
        ("labels: A = first, B = second", "labels: A = first, A = second", r"labels names a choice twice"),
        ("labels: A = first, B = second", "labels: A = first, B = tie", r"labels must name first, second"),
        ("labels: A = first, B = second", "labels: 1 .. 10", r"mine.txt:3: a scale like 1 .. 10"),
        ("labels: A = first, B = second\n", "", r"mine.txt: labels names 0 choices"),
        ("verdict: [[{label}]]", "verdict: [[A]]", r"verdict is '\[\[A\]\]'; it holds \{label\} once"),
        ("verdict: [[{label}]]\n", "", r"it needs a \[direct\] section, or a verdict at the end"),
        ("max_tokens: 100", "max_tokens: many", r"mine.txt:5: max_tokens is 'many', not a number"),
        ("max_tokens: 100", "maxtokens: 100", r"mine.txt:5: 'maxtokens: 100' is no setting"),
        ("[user]", "[human]", r"mine.txt: the section \[user\] is missing"),
        ("[reasons]", "[user]", r"mine.txt:13: the section \[user\] is there twice"),
    ],
)
def test_a_broken_file_is_reported_with_its_line(old: str, new: str, message: str, tmp_path: Path):
    path = tmp_path / "mine.txt"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_template(path)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*none\.txt: No such file"):
        read_template(tmp_path / "none.txt")


def test_fastchats_file(shared_data, tmp_path: Path):
    path = shared_data("mt_bench/judge_prompts.jsonl")
    names = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    pair, one = read_template(Path(f"{path}#pair-v2")), read_template(Path(f"{path}#single-v1"))
    assert pair.form == "ranking" and one.form == "rating" and one.numeric and not one.scorable
    rendered = pair.render(Question("Why?", ("x", "y")), (0, 1), ending="reasons")
    assert "[The Start of Assistant A's Answer]\nx\n" in rendered.messages[1]["content"]
    assert read_verdict(Reply("I first thought [[A]], but [[C]]"), pair, rendered, direct=False).status == "tie"
    rendered = one.render(Question("Why?", ("x",)), ending="reasons")
    assert read_verdict(Reply("Rating: [[7.5]]"), one, rendered, direct=False).value == 7.5
    assert read_verdict(Reply("Rating: [[12]]"), one, rendered, direct=False).status == "unparsed"
    with pytest.raises(UserError, match=r"asks for \{reference\}"):
        read_template(Path(f"{path}#pair-math-v1")).render(Question("p", ("a", "b")), (0, 1), ending="reasons")
    with pytest.raises(UserError, match=r"judge_prompts.jsonl:2: unknown placeholder \{question_1\}"):
        read_template(Path(f"{path}#pair-v2-multi-turn"))
    with pytest.raises(UserError, match=f"there is no judge prompt 'x'; write FILE#NAME with one of {names[0]}"):
        read_template(Path(f"{path}#x"))


def test_a_file_of_fastchats_shape(tmp_path: Path):
    good = {"name": "pair", "type": "pairwise", "prompt_template": "{question} {answer_a} {answer_b}"}
    lines = [good | {"output_format": "[[A]]"}, good | {"name": "other", "output_format": "[[B]]"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    template = read_template(Path(f"{path}#pair"))
    assert template.user == "{prompt} {answer_1} {answer_2}" and template.form == "ranking"
    with pytest.raises(UserError, match=r"prompts.jsonl:2: output_format is '\[\[B\]\]'; \[\[A\]\] and"):
        read_template(Path(f"{path}#other"))
    with pytest.raises(UserError, match="there is no judge prompt ''; write FILE#NAME with one of pair, other"):
        read_template(path)
    path.write_text('{"name": "cut\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:1: no valid JSON"):
        read_template(Path(f"{path}#pair"))
    path.write_text("[1]\n")
    with pytest.raises(UserError, match=r"prompts.jsonl:1: a judge prompt is an object with a name"):
        read_template(Path(f"{path}#pair"))


def test_a_path_may_hold_a_number_sign(tmp_path: Path):
    folder = tmp_path / "run #3"
    folder.mkdir()
    (folder / "mine.txt").write_text(GOOD)
    assert read_template(folder / "mine.txt").name == "mine"
    line = {
        "name": "pair",
        "type": "pairwise",
        "prompt_template": "{question} {answer_a} {answer_b}",
        "output_format": "[[A]]",
    }
    (folder / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    assert read_template(Path(f"{folder}/prompts.jsonl#pair")).form == "ranking"
