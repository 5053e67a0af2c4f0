"""Each command, option and reward line in README and guides is one that the tools take."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from rlaif_jax import command_line
from rlaif_jax.__main__ import tool
from rlaif_jax.recipes.rewards import KINDS, read_reward

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
        for name in ("README.md", "own-model.md", "coming-from.md", "reading-a-report.md", "runs.md")
        for span in re.findall(
            r"`((?:--|ppo\.advantage:)[^`]+)`", PAGES[name].partition("## Your own model, prompts")[2] or PAGES[name]
        )
        if "*" not in span and "..." not in span
    }
)
REWARDS = re.findall(
    r"^\| `(.+?)` \|", PAGES["own-model.md"].partition("\n## Feedback\n")[2].partition("\n## ")[0], re.MULTILINE
)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses the command line of a tool without running it."""
    seen = []

    def only_parse(main, default, description=None, *, loading=None, **unused):
        if loading is not None:
            loading.done()
        seen.append(command_line._parse_arguments(default, description))

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
        tools = [name for name in known if words[0] in known[name]]
        assert tools, span
        if words[-1].startswith("--"):  # without its value
            assert {word for word in words if word.startswith("--")} <= known[tools[0]], span
        else:
            with_critic = ["ppo.advantage:gae"] * ("--ppo.kl-in" in words)
            parse([tools[0], *words, *with_critic])


@pytest.mark.parametrize("line", REWARDS)
def test_reward_lines(line):
    assert line.split()[0] in KINDS
    read_reward(line)


def test_every_kind_of_reward_has_a_line():
    assert {line.split()[0] for line in REWARDS} == set(KINDS)
