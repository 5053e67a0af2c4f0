"""Pairs and trees in other tools' shapes, on small hand-made files."""

from __future__ import annotations

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from rlaif_jax.feedback.records.formats import pairs, rows
from rlaif_jax.feedback.records.forms import Ranking, Rating


def test_hh_splits_at_the_last_place_that_both_share(write):
    start = "\n\nHuman: hi\n\nAssistant:"
    path = write(
        "hh.jsonl",
        {"chosen": f"{start} good", "rejected": f"{start} great"},
        {
            "chosen": f"{start} so\n\nHuman: why\n\nAssistant: x",
            "rejected": f"{start} no\n\nHuman: why\n\nAssistant: x",
        },
        {"chosen": f"{start} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{start} a\n\nHuman: b\n\nAssistant:"},
        {"chosen": start, "rejected": start},
        {"chosen": "one", "rejected": "two"},
        {"chosen": "one"},
        ["one", "two"],
    )
    good, bad = pairs.read_hh(path)
    assert [(j.prompt, *j.answers) for j in good] == [
        (start, " good", " great"),
        (start, " so\n\nHuman: why\n\nAssistant: x", " no\n\nHuman: why\n\nAssistant: x"),
        (f"{start} a\n\nHuman: b\n\nAssistant:", " c", ""),
    ]
    assert [message.split(": ", 1) for message in bad] == [
        [f"{path}:4", "chosen and rejected are the same text"],
        [f"{path}:5", r"chosen and rejected share no beginning that ends in '\n\nAssistant:'"],
        [f"{path}:6", "no field 'rejected'; the fields are chosen"],
        [f"{path}:7", "a row must be an object, not \"['one', 'two']\""],
    ]


def test_hh_there_and_back(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant:"
    assert pairs.write_hh([rows.pair("What is 2+2?", ("4", "5"), 0, pairs.CROWD)], tmp_path / "hh") == 1
    assert pairs.read_hh(tmp_path / "hh") == (
        [rows.pair("\n\nHuman: What is 2+2?\n\nAssistant:", (" 4", " 5"), 0, pairs.CROWD)], []
    )  # fmt: skip
    records = [
        rows.pair(start, (" a", " b"), 0, pairs.CROWD),
        rows.pair(start, (" a", " c"), 1, pairs.CROWD),
        rows.pair(start, (" a", " d"), None, pairs.CROWD),
        Ranking(prompt=start, answers=(" x", " y", " z"), rater=pairs.CROWD, ranks=(1, 2, 2)),
        Rating(prompt=start, answers=(" a",), rater=pairs.CROWD, value=3),
    ]
    assert pairs.write_hh(records, tmp_path / "hh") == 4
    good, bad = pairs.read_hh(tmp_path / "hh")
    assert bad == [] and [j.answers for j in good] == [(" a", " b"), (" c", " a"), (" x", " y"), (" x", " z")]


def test_distilabel(write):
    path = write(
        "d.jsonl",
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rating": 5, "rejected_rating": 2.5,
         "chosen_model": "m", "rejected_model": "n"},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rating": 4, "rejected_rating": 4},
        {"instruction": "i", "generations": ["a", "b", "c", None], "ratings": [4, None, 9, 1],
         "rationales": ["since", None, "", ""], "generation_models": ["m", "n", "o", "o"]},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"chosen": "a", "rejected": "b"},
    )  # fmt: skip
    good, bad = pairs.read_distilabel(path)
    assert [(j.form, j.status, j.prompt, j.answers) for j in good] == [
        ("ranking", "ok", "p", ("a", "b")), ("rating", "ok", "p", ("a",)), ("rating", "ok", "p", ("b",)),
        ("ranking", "ok", "q", ("a", "b")),
        ("ranking", "tie", "p", ("a", "b")), ("rating", "ok", "p", ("a",)), ("rating", "ok", "p", ("b",)),
        ("rating", "ok", "i", ("a",)), ("comment", "ok", "i", ("a",)), ("rating", "unparsed", "i", ("b",)),
    ]  # fmt: skip
    assert pairs.read_distilabel(path).unused == {"generation that is null": 1}
    assert good[0].generators == ("m", "n") and good[2].value == 2.5 and good[2].generators == ("n",)
    assert [message[len(str(path)) :][:36] for message in bad] == [
        ":4: value is 9.0, off the scale 1 ..", ":5: chosen and rejected are the same", ":6: no prompt: expected a text or me"
    ]  # fmt: skip
    assert [m[:20] for m in pairs.read_distilabel(path, high=10)[1]] == [m[:20] for m in bad[1:]]


def test_distilabel_there_and_back(tmp_path):
    record = rows.pair("p", ("a", "b"), 1, pairs.DISTILABEL, generators=("m", "n"))
    assert pairs.write_distilabel([record], tmp_path / "d") == 1
    good, bad = pairs.read_distilabel(tmp_path / "d")
    assert bad == [] and good == [rows.pair("p", ("b", "a"), 0, pairs.DISTILABEL, generators=("n", "m"))]


EXMOOR, OTHER = "Exmoor.", "No idea."


def said(*texts, system=""):
    """Messages: the user and the assistant in turn."""
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(text):
    return [{"role": "assistant", "content": text}]


def only(write, row):
    """The prompt of the one comparison that a row gives."""
    good, bad = pairs.read_distilabel(write("row.jsonl", row))
    assert bad == [] and [j.answers for j in good if isinstance(j, Ranking)] == [(EXMOOR, OTHER)]
    return good[0].prompt


TALK = "\n\nHuman: I am going to Devon.\n\nAssistant: A fine county.\n\nHuman: Name a moor there.\n\nAssistant:"
BEFORE = ("I am going to Devon.", "A fine county.", "Name a moor there.")
BRIEF = "Be brief."


@pytest.mark.parametrize("given", [{}, {"prompt": "Name a moor there."}, {"prompt": "I am going to Devon."},
                                   {"prompt": "Moors"}, {"prompt": TALK}, {"prompt": said(*BEFORE)}])  # fmt: skip
def test_conversations_keep_every_turn(write, given):
    row = {"chosen": said(*BEFORE, EXMOOR), "rejected": said(*BEFORE, OTHER)} | given
    assert only(write, row) == TALK
    lost = pairs.read_distilabel(write("row.jsonl", row)).unused
    assert lost == ({"field prompt: not what the conversation says": 1} if given == {"prompt": "Moors"} else {})


@pytest.mark.parametrize("sides", [lambda text: answer(text), lambda text: text])
def test_messages_in_the_prompt_as_trl_has_them(write, sides):
    row = {"chosen": sides(EXMOOR), "rejected": sides(OTHER)}
    assert only(write, row | {"prompt": said("Name a moor.")}) == "Name a moor."
    assert only(write, row | {"prompt": said(*BEFORE)}) == TALK
    assert only(write, row | {"prompt": said(*BEFORE, system=BRIEF)}) == BRIEF + TALK
    assert only(write, row | {"prompt": said("Name a moor."), "system": BRIEF}) == (
        "Be brief.\n\nHuman: Name a moor.\n\nAssistant:"
    )
    last = {"chosen": said(BEFORE[2], EXMOOR), "rejected": said(BEFORE[2], OTHER)}
    assert only(write, last | {"prompt": said(*BEFORE, system=BRIEF)}) == BRIEF + TALK


def test_an_answer_at_the_beginning_is_one_to_the_prompt(write):
    sides = {"chosen": [*answer("A fine county."), *said(BEFORE[2], EXMOOR)]}
    sides["rejected"] = [*answer("A fine county."), *said(BEFORE[2], OTHER)]
    assert only(write, sides | {"prompt": BEFORE[0]}) == TALK
    assert only(write, sides | {"prompt": BEFORE[0], "system": BRIEF}) == BRIEF + TALK
    assert (
        only(write, sides | {"prompt": BEFORE[2]}) == only(write, sides) == TALK.replace("\n\nHuman: " + BEFORE[0], "")
    )


def test_what_a_person_says_next_is_no_answer(tmp_path):
    record = rows.pair("\n\nHuman: q\n\nAssistant: a\n\nHuman:", (" x", " y"), 0, pairs.CROWD)
    assert pairs.write_hh([record], tmp_path / "h") == pairs.write_distilabel([record], tmp_path / "d") == 0


def test_a_system_message_is_no_turn_of_the_person(write):
    one = "Be brief.\n\nHuman: Name a moor.\n\nAssistant:"
    talks = {
        "chosen": said("Name a moor.", EXMOOR, system=BRIEF),
        "rejected": said("Name a moor.", OTHER, system=BRIEF),
    }
    assert only(write, talks) == only(write, talks | {"prompt": "Name a moor."}) == one
    texts = {"chosen": EXMOOR, "rejected": OTHER}
    for asked in ({"question": "Name a moor."}, {"input": "Name a moor."}, {"prompt": "Name a moor."}):
        assert (
            only(write, texts | asked | {"system": BRIEF})
            == only(write, texts | asked | {"system_prompt": BRIEF})
            == one
        )
        assert only(write, texts | asked | {"system": ""}) == "Name a moor."
    assert only(write, texts | {"instruction": "Name it.", "input": "A moor."}) == "Name it.\n\nA moor."


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": answer("a"), "rejected": answer("b")}, "no prompt: expected a text or messages in prompt"),
        ({"chosen": said("p", "a"), "rejected": said("q", "b")}, "chosen and rejected differ before their last message"),
        ({"chosen": said("p", "a", "x"), "rejected": said("p", "b", "y")}, "the last message of chosen is by the user"),
        ({"chosen": [], "rejected": said("p", "b")}, "chosen must be a list of messages, not '[]'"),
        ({"chosen": [{"role": "tool", "content": "x"}], "rejected": "b"}, "message 1 of chosen has the role 'tool'; a mes"),
        ({"chosen": [{"content": "x"}], "rejected": "b"}, "message 1 of chosen must have role and content, both texts"),
        ({"chosen": [{"role": "user", "content": ["x"]}], "rejected": "b"}, "message 1 of chosen has a part of type 'str'"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt must be a list of messages"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt must be text, not '3'"),
        ({"prompt": "p", "chosen": {}, "rejected": "b"}, "chosen must be text or a list of messages, not '{}'"),
    ],
)  # fmt: skip
def test_what_is_no_pair_of_answers_to_one_prompt(write, row, message):
    path = write("bad.jsonl", row)
    good, bad = pairs.read_distilabel(path)
    assert good == [] and len(bad) == 1 and bad[0].startswith(f"{path}:1: {message}")


COLUMNS = [("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"), ("rating_chosen", "rating_rejected"),
           ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosenScore", "rejectedScore"),
           ("Chosen Reward", "Rejected Reward"), ("chosen_avg_rating", "rejected_avg_rating")]  # fmt: skip


@pytest.mark.parametrize("columns", COLUMNS)
def test_ratings_by_any_name(write, columns):
    def read(*values):
        return pairs.read_distilabel(write("r.jsonl", row | dict(zip(columns, values))))

    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    good, bad = read(4, 4)
    assert bad == [] and [(j.form, j.status) for j in good] == [("ranking", "tie"), ("rating", "ok"), ("rating", "ok")]
    assert [(j.status, j.ranks) for j in read("4.5", 2)[0][:1]] == [("ok", (1, 2))]
    good, bad = read(2, 4)
    assert [j.form for j in good] == ["rating", "rating"]
    assert [message.split(": ", 1)[1] for message in bad] == [
        "the chosen answer is rated 2.0, below the rejected one, 4.0: the comparison is left out"
    ]
    good, bad = read(8.5, 8.5)  # off the scale: equal all the same
    assert [j.status for j in good] == ["tie"] and len(bad) == 2 and all("off the scale 1 .. 5" in m for m in bad)
    for nothing in (None, float("nan"), ""):
        assert [j.form for j in read(4, nothing)[0]] == ["ranking", "rating"]
    good, bad = read(4, "good")
    assert [j.form for j in good] == ["ranking"] and bad[0].endswith(f"{columns[1]} must be a number, not 'good'")
    assert read(4).unused == {f"field {columns[0]}": 1}  # of one side alone


def test_the_two_sets_of_orca_pairs(write):
    old = {"system": BRIEF, "input": "Name a moor.", "chosen": EXMOOR, "rejected": OTHER, "generations": [OTHER, EXMOOR],
           "rating": [1.0, 9.0], "rationale": "The first is one.", "status": "swapped", "chosen_score": 9.0}  # fmt: skip
    plain = {"system": "", "question": "Name a moor.", "chosen": EXMOOR, "rejected": OTHER}
    path = write("o.jsonl", old, plain, old | {"rating": [7, 7]}, old | {"rating": [9, 1]})
    found = pairs.read_distilabel(path, high=10)
    prompt = "Be brief.\n\nHuman: Name a moor.\n\nAssistant:"
    assert [(j.status, j.prompt, j.answers) for j in found[0] if isinstance(j, Ranking)] == [
        ("ok", prompt, (EXMOOR, OTHER)), ("ok", "Name a moor.", (EXMOOR, OTHER)), ("tie", prompt, (EXMOOR, OTHER)),
    ]  # fmt: skip
    rated = [(j.answers[0], j.value) for j in found[0] if isinstance(j, Rating)]
    assert rated == [(OTHER, 1), (EXMOOR, 9), (OTHER, 7), (EXMOOR, 7), (OTHER, 9), (EXMOOR, 1)]
    assert [m.split(": ", 1)[1] for m in found[1]] == [
        "the chosen answer is rated 1.0, below the rejected one, 9.0: the comparison is left out"
    ]
    assert found.unused == {"field rationale": 2, "field chosen_score": 2}  # of the rows without a fault
    tied = old | {"rating": [None, None], "status": "tie"}
    assert pairs.read_distilabel(write("t.jsonl", tied))[0][0].status == "tie"


TURNS = st.lists(st.text("ab \n:", max_size=6), min_size=1, max_size=5)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(TURNS.filter(lambda turns: len(turns) % 2), st.sampled_from(["", BRIEF]))
def test_conversations_come_back_from_the_file(tmp_path, turns, system):
    if system or len(turns) > 1:
        marks = ("\n\nHuman: ", "\n\nAssistant: ")
        prompt = system + "".join(marks[i % 2] + turn for i, turn in enumerate(turns)) + "\n\nAssistant:"
    else:
        prompt = turns[0] or "p"
    record = rows.pair(prompt, ("x", " y"), 0, pairs.DISTILABEL)
    assert pairs.write_distilabel([record], tmp_path / "d") == 1
    (row,) = [json.loads(line) for line in (tmp_path / "d").read_text().split("\n")[:-1]]
    assert pairs.read_distilabel(tmp_path / "d") == ([record], [])
    if any(turns[::2]) and (system or len(turns) > 1):
        assert [m["role"] for m in row["chosen"]] == ["system"] * bool(system) + ["user", "assistant"] * (
            len(turns) // 2 + 1
        )
        assert [m["content"] for m in row["chosen"]][bool(system) : -1] == turns


def test_oasst_ranks_replies_at_every_depth(write):
    def node(role, text, *replies, rank=None):
        return {"role": role, "text": text, "replies": list(replies), "rank": rank}

    follow = [node("prompter", "q", rank=1), node("prompter", "r", rank=0)]
    tree = node(
        "prompter", "p", node("assistant", "a", *follow, rank=1), node("assistant", "b", rank=0), node("assistant", "c")
    )
    path = write("o.jsonl", {"prompt": tree}, {"prompt": node("prompter", "x", {"role": "assistant"})}, {"tree": 1})
    good, bad = pairs.read_oasst(path)
    assert [(j.prompt, j.answers, j.ranks) for j in good] == [
        ("\n\nHuman: p\n\nAssistant:", ("a", "b", "c"), (2, 1, None)),
        ("\n\nHuman: p\n\nAssistant: a\n\nHuman:", ("q", "r"), (2, 1)),
    ]
    assert [message.split(": ", 1)[1] for message in bad] == [
        "no field 'text'; the fields are role", "no field 'prompt'; the fields are tree"
    ]  # fmt: skip
    mixed = node("prompter", "p", node("assistant", "a", rank=0), node("prompter", "b", rank=1))
    lonely = node("prompter", "p", node("assistant", "a", node("tool", "x")))
    found = pairs.read_oasst(write("m.jsonl", {"prompt": mixed}, {"prompt": lonely}))
    assert found[0] == [] and [message.split(": ", 1)[1][:40] for message in found[1]] == [
        "replies to one turn are by assistant and", "the role 'tool'; a message is by system,"
    ]  # fmt: skip
    assert found.unused == {"turn with fewer than two ranked replies": 2}


def test_critique_requests(write):
    one = {"prompt": "What is wrong?", "edit_request": "Mend it."}
    path = write("c.json", json.dumps({"first": one, "second": {"prompt": "x"}}, indent=2), {"name": "third", **one})
    requests, bad = pairs.read_critique_requests(path)
    assert requests == [("first", "What is wrong?", "Mend it."), ("third", "What is wrong?", "Mend it.")]
    assert bad == [f"{path}:1, second: no field 'edit_request'; the fields are prompt"]


def test_helpsteer_has_a_rating_for_each_criterion_and_preferences_with_strengths(write):
    rating = {"prompt": "p", "response": "a", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1}
    good, bad = pairs.read_helpsteer(
        write("ratings.jsonl", rating | {"verbosity": 0}, rating | {"helpfulness": 5}, {"prompt": "p"})
    )
    assert [(j.principle, j.value, j.unit) for j in good] == [
        ("helpfulness", 3, 0.75), ("correctness", 4, 1), ("coherence", 4, 1), ("complexity", 1, 0.25), ("verbosity", 0, 0)
    ]  # fmt: skip
    assert [message.partition(": ")[2] for message in bad] == [
        "value is 5.0, off the scale 0 .. 4",
        "no field 'response'; the fields are prompt",
    ]
    pair = {"prompt": "p", "response_1": "a", "response_2": "b"}
    strengths = (-3, -1, 0, 2, 4)
    good, bad = pairs.read_helpsteer(write("pairs.jsonl", *[pair | {"preference_strength": s} for s in strengths]))
    assert [(j.ranks, j.status, j.strength) for j in good] == [
        ((1, 2), "ok", 5), ((1, 2), "ok", 1), ((1, 1), "tie", None), ((2, 1), "ok", 3)
    ]  # fmt: skip
    assert bad[0].endswith("preference_strength is 4; it lies between -3 and 3")
