"""Each command, option and reward line in README and guides is one that the tools take."""

from __future__ import annotations

import json
import re
import shlex
import sys
import typing
from pathlib import Path

import pytest

from rlaif_jax import command_line
from rlaif_jax.__main__ import tool
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.records.exchange import Detected
from rlaif_jax.feedback.verifiers.constraints import Constraint, Constraints, read_constraints
from rlaif_jax.feedback.verifiers.unit_tests import UnitTests
from rlaif_jax.recipes.reward_model import read_comparisons
from rlaif_jax.recipes.rewards import KINDS, read_reward
from rlaif_jax.recipes.sft import read_row

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md")))}
COMMANDS = sorted(
    {
        " ".join(found.replace("\\\n", " ").partition(" #")[0].split())
        for text in PAGES.values()
        for found in (
            *(match[1] for match in re.finditer(r"^    python -m rlaif_jax ((?:.*\\\n)*.*)$", text, re.MULTILINE)),
            *re.findall(r"`python -m rlaif_jax ([^`]+ [^`]+)`", text),
        )
        if "--help" not in found
    }
)
OPTIONS = sorted(
    {
        span
        for name in ("README.md", "own-model.md", "fine-tuning.md", "coming-from.md", "reading-a-report.md", "runs.md")
        for span in re.findall(
            r"`((?:--|ppo\.advantage:)[^`]+)`", PAGES[name].partition("## Your own model, prompts")[2] or PAGES[name]
        )
        if "*" not in span and "..." not in span
    }
)
REWARDS = re.findall(
    r"^\| `(\w.+?)` \|", PAGES["own-model.md"].partition("\n## Feedback\n")[2].partition("\n## ")[0], re.MULTILINE
)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses the command line of a tool without running it."""
    seen = []

    def only_parse(main, default, description=None, *, loading=None, named=(), **unused):
        if loading is not None:
            loading.done()
        seen.append(command_line._parse_arguments(default, description, named=dict(named)))

    def parse(words):
        tool(words)
        return seen[-1]

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"  # of --config
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(command_line, "command_line", only_parse)
    return parse


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, parse):
    parse(shlex.split(command))


def options_of(name: str, capsys) -> set[str]:
    """Returns the options of a tool, and the words that choose an advantage, as --help shows them."""
    with pytest.raises(SystemExit):
        tool([name, "--help"])
    return set(re.findall(r"(?:--|ppo\.advantage:)[a-z][\w.-]*", capsys.readouterr().out))


def test_options(capsys, parse):
    known = {name: options_of(name, capsys) for name in ("train", "sft", "reward-model", "judge")}
    for span in OPTIONS:
        words = [re.sub(r"^[NM]$", "2", word) for word in shlex.split(span)]
        options = {words[0], *(word for word in words if word.startswith("--"))}
        tools = [name for name in known if words[0] in known[name]]
        assert tools, span
        tools.sort(key=lambda name: -len(options & known[name]))
        if words[-1].startswith("--"):  # without its value
            assert options <= known[tools[0]], span
        else:
            with_critic = ["ppo.advantage:gae"] * ("--ppo.kl-in" in words)
            parse([tools[0], *words, *with_critic])


@pytest.mark.parametrize("line", REWARDS)
def test_reward_lines(line):
    assert line.split()[0] in KINDS
    read_reward(line)


def test_every_kind_of_reward_has_a_line():
    assert {line.split()[0] for line in REWARDS} == set(KINDS)


def test_every_constraint_has_a_line_that_is_read():
    lines = re.findall(r"^\| `(\{.+?\})` \|", PAGES["own-model.md"], re.MULTILINE)
    found = read_constraints([json.loads(line) for line in lines], "constraints")
    assert len(lines) == len(found) and {type(x) for x in found} == set(typing.get_args(Constraint))


def test_records_of_the_guide_are_judged():
    records = [json.loads(line) for line in re.findall(r'^\{"prompt".+\}$', PAGES["own-model.md"], re.MULTILINE)]
    code = "```python\ndef double(x): return abs(2 * x)\n```"
    tested = [record for record in records if "tests" in record]
    values = UnitTests(allow_code_execution=True).build()(tested, [code] * 2, None).values
    assert values[:, 0].tolist() == [0.5, 0.5]
    limited = [record for record in records if len(record.get("constraints", "")) == 2]
    assert Constraints().build()(limited, ["Rhine, Nile, Ganges."], None).values.tolist() == [[0.5]]


ROWS = re.findall(r"^\{.+\}$", PAGES["fine-tuning.md"].partition("\n## Train a reward")[0], re.MULTILINE)


@pytest.mark.parametrize("line", ROWS)
def test_rows_of_texts_are_learned(line):
    learned, _ = read_row(json.loads(line), word_level_tokenizer(sorted(set(line.split()))), add_bos=False)
    assert sum(learned.weights) > 0


def test_rows_of_pairs_are_known_by_their_first(tmp_path):
    rows = re.findall(r"^\{.+\}$", PAGES["fine-tuning.md"].partition("\n## Train a reward")[2], re.MULTILINE)
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    found = read_comparisons([tmp_path / "pairs.jsonl"], Detected(), ())
    better = [pair.answers[0 if pair.probability == 1 else 1] for pair in found.pairs]
    assert len(rows) == 2 and better == [json.loads(line)["chosen"] for line in rows]
