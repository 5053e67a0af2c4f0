"""What the runs of the covering table share: a model that answers in all forms that are rewarded, and what rewards them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from rlaif_jax.algorithms.fit import FitConfig
from rlaif_jax.models.heads import ScalarModel
from rlaif_jax.models.hf.classifiers import save_reward_model
from rlaif_jax.models.hf.files import load_with_tokenizer
from rlaif_jax.recipes import sft
from rlaif_jax.recipes.sft import SFTConfig
from tests.feedback.api_server import LETTERS, completion, serve
from tests.recipes.combinations.runs import MESH, digest

PEOPLE, DEEDS = (
    ("Lily", "Tom", "Sara", "Ben"),
    ("saw a dog", "had a ball", "ran home", "was sad", "went to bed", "said no"),
)
PROMPTS = [f"{name} {deed}." for name in PEOPLE for deed in DEEDS]
ANSWERS = ("7", "8", "[1]", "{}", "yes", "no", "```\nf=abs\n```", "```\nf=int\n```", "She ran.")
RECORD = {
    "answer": "Yes",
    "number": "7",
    "schema": {"type": "array"},
    "constraints": [{"type": "max_words", "count": 1}, {"type": "min_words", "count": 1}],
    "tests": ["assert f(-2) == 2", "assert f(3) == 3"],
}
FUNCTIONS = """
def brevity(answer):
    return max(0.0, 1 - len(answer) / 20)


def fussy(prompt, answer):
    if "7" in answer:
        raise ValueError("no 7, please")
    return len(answer) if prompt < "Sara" else None
"""
RULES = """
name = "in letters"
[[rule]]
name = "letters"
pattern = "[a-z]"
at_least = 3
[[formula]]
name = "in letters"
formula = "letters"
"""
PAIR = """
form: ranking
labels: A = first, B = second
[user]
{prompt}
A: {answer_1}
B: {answer_2}
[direct]
The better one is
"""


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def inputs(shared_data, tmp_path_factory):
    """A folder with stories260K that `sft` has taught short answers, a reward model, prompts, functions, rules."""
    path = tmp_path_factory.mktemp("inputs")
    write_lines(
        path / "taught.jsonl", [{"prompt": prompt, "completion": text} for prompt in PROMPTS for text in ANSWERS]
    )
    taught = SFTConfig(
        model=str(shared_data("lm_stories260k/stories260K.bin")),
        data=(str(path / "taught.jsonl"),),
        out=path / "sft",
        max_length=64,
        fit=FitConfig(updates=80, batch_size=8, learning_rate=4e-3),
        parallel=MESH(1),
        check_every=80,
    )
    sft.main(taught)
    (path / "sft" / "model").rename(path / "lm")
    model, params, tokenizer = load_with_tokenizer(str(path / "lm"), None)
    scalar = ScalarModel(model.config, "normal", bias=False)
    save_reward_model(path / "rm", scalar, scalar.init(jax.random.key(0), params["trunk"]), tokenizer)
    write_lines(path / "prompts.jsonl", [{"prompt": prompt, **RECORD} for prompt in PROMPTS])
    (path / "rewards.py").write_text(FUNCTIONS)
    (path / "rules.toml").write_text(RULES)
    (path / "pair.txt").write_text(PAIR)
    return path


@pytest.fixture(autouse=True)
def few_programs():
    """After a run its programs are dropped: no other run can use them, and those of all runs fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def server():
    """A server whose judge gives each question a label of its own liking, and the probability of the others."""

    def reply(body: dict[str, Any], number: int) -> dict[str, Any]:
        at = digest(body["messages"][-1]["content"].partition("<answer")[2].partition(">")[2].partition("<")[0]) % 10
        return completion(LETTERS[at], top=[(LETTERS[at], 0.7), (LETTERS[at - 1], 0.3)])

    with serve(reply) as found:
        yield found
