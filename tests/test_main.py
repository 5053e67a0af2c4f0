"""`python -m rlaif_jax TOOL`: each tool is listed, explains each of its options, and says in one line what is wrong."""

import dataclasses
import importlib
import re
import signal
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import rlaif_jax
from rlaif_jax.__main__ import TOOLS, tool
from rlaif_jax.feedback.api.command import JudgeConfig
from rlaif_jax.feedback.records import exchange
from rlaif_jax.recipes.reward_model import RewardModelConfig
from rlaif_jax.recipes.rlaif import RlaifConfig
from rlaif_jax.recipes.sft import SFTConfig
from rlaif_jax.tools.export import ExportConfig
from rlaif_jax.tools.generate import GenerateConfig
from rlaif_jax.tools.pages import PagesConfig
from rlaif_jax.ui.annotate import AnnotateConfig

CONFIGS = {
    "train": RlaifConfig, "sft": SFTConfig, "reward-model": RewardModelConfig, "generate": GenerateConfig,
    "export": ExportConfig, "report": PagesConfig, "judge": JudgeConfig, "annotate": AnnotateConfig,
    "import-feedback": exchange.ImportConfig, "export-feedback": exchange.ExportConfig,
}  # fmt: skip
SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "experiments").glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def same_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # `tool` sets it
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


def ended(capsys, *arguments):
    """Runs a tool that ends the process; returns (exit status, standard output, standard error)."""
    with pytest.raises(SystemExit) as end:
        tool(list(arguments))
    return end.value.code, *capsys.readouterr()


def explanation(config, name):
    """Returns the first line on an option in the docstring of a config or of a class that it extends; "" without one."""
    found = (re.search(rf"^ +{name}: (.+)$", c.__doc__ or "", re.MULTILINE) for c in config.__mro__)
    return next((match[1] for match in found if match), "")


@pytest.mark.parametrize("name", CONFIGS)
def test_help_explains_each_option(name, capsys):
    status, out, _ = ended(capsys, name, "--help")
    assert status == 0 and re.search(rf"^  {name} +\w", TOOLS, re.MULTILINE)
    assert out.count(f"python -m rlaif_jax {name} ") > 1, "how it is used, and an example"
    flat = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    for field in dataclasses.fields(CONFIGS[name]):
        explained = explanation(CONFIGS[name], field.name)
        option = field.name.replace("_", "-")
        assert explained and " ".join(explained.split()[:4]) in flat, field.name
        assert f"--{option}" in flat or f"{option}:" in out or name in ("export", "report"), option


def unexplained(config, name=""):
    """Yields the dotted name of each option of a config, also of its parts and choices, that no docstring explains."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        line = explanation(config, field.name)
        if field.init and len(re.findall(r"[A-Za-z]{2,}", line)) < 2:
            yield f"{name}{field.name}: {line!r}"
        broken = re.search(
            rf"^( +){field.name}: .+\n(?:\1 +\w.*\n)*\1 +([^\w\s].*)$", config.__doc__ or "", re.MULTILINE
        )
        if broken:  # tyro would begin a line of the help text there
            yield f"{name}{field.name}: a line begins with neither a letter nor a digit: {broken[2]}"
        for part in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(part):
                yield from unexplained(part, f"{name}{field.name}.")


@pytest.mark.parametrize("config", CONFIGS.values())
def test_each_option_of_a_part_or_choice_has_a_line(config):
    assert list(unexplained(config)) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_option_of_an_experiment_has_a_line(script):
    module = importlib.import_module(f"experiments.{script}")
    configs = [x for name, x in vars(module).items() if name.endswith("Config") and x.__module__ == module.__name__]
    assert configs or "get_config" in vars(module), "the settings of a script are a class ...Config"
    assert [line for config in configs for line in unexplained(config)] == []


def test_the_settings_of_rewards_have_a_page(capsys):
    status, out, _ = ended(capsys, "train", "--help-rewards")
    assert status == 0 and out.startswith("A reward is a line of words") and "usd_per_million_prompt=0.0" in out
    assert "train --help-rewards` explains" in ended(capsys, "train", "--help")[1]


WRONG = {
    "sft": ((), "error: no model to begin with: give --model"),
    "reward-model": (("--feedback", "none.jsonl"), "error: no model"),
    "generate": (("--model", "none/x/y"), "error: no model at none/x/y"),
    "export": (("none",), "error: no folder to write to: give --out"),
    "report": (("none",), "error: none: there is no such folder"),
    "dance": ((), "error: there is no tool 'dance'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_and_exit_code_2(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[name]
    status, out, err = ended(capsys, name, *arguments)
    lines = [line for line in err.splitlines() if " loading" not in line]
    assert status == 2 and out == "" and lines[0].startswith(message)
    assert len(lines) == 1 or name == "dance"
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_the_tools_are_listed_in_order(capsys):
    tool(["--help"])
    out = capsys.readouterr().out
    assert out == TOOLS
    assert re.findall(r"^  ([\w-]+)", out, re.MULTILINE) == [
        "train", "sft", "reward-model", "generate", "export", "report", "judge", "annotate", "import-feedback",
        "export-feedback",
    ]  # fmt: skip


def test_the_version_is_that_of_pyproject_and_needs_no_jax(capsys):
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    tool(["--version"])
    assert (
        capsys.readouterr().out
        == f"rlaif-jax {rlaif_jax.__version__}\n"
        == f"rlaif-jax {pyproject['project']['version']}\n"
    )
    code = "import sys, rlaif_jax; rlaif_jax.__version__; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'version'"):
        _ = rlaif_jax.version
