"""Pairs and trees in other tools' shapes, on small hand-made files."""

from __future__ import annotations

import json

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
    assert good[0].generators == ("m", "n") and good[2].value == 2.5 and good[2].generators == ("n",)
    assert [message[len(str(path)) :][:36] for message in bad] == [
        ":4: value is 9.0, off the scale 1 ..", ":5: chosen and rejected are the same", ":6: no prompt: there is no field pro"
    ]  # fmt: skip
    assert [m[:20] for m in pairs.read_distilabel(path, high=10)[1]] == [m[:20] for m in bad[1:]]


def test_distilabel_there_and_back(tmp_path):
    record = rows.pair("p", ("a", "b"), 1, pairs.DISTILABEL, generators=("m", "n"))
    assert pairs.write_distilabel([record], tmp_path / "d") == 1
    good, bad = pairs.read_distilabel(tmp_path / "d")
    assert bad == [] and good == [rows.pair("p", ("b", "a"), 0, pairs.DISTILABEL, generators=("n", "m"))]


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


def test_critique_requests(write):
    one = {"prompt": "What is wrong?", "edit_request": "Mend it."}
    path = write("c.json", json.dumps({"first": one, "second": {"prompt": "x"}}, indent=2), {"name": "third", **one})
    requests, bad = pairs.read_critique_requests(path)
    assert requests == [("first", "What is wrong?", "Mend it."), ("third", "What is wrong?", "Mend it.")]
    assert bad == [f"{path}:1, second: no field 'edit_request'; the fields are prompt"]
