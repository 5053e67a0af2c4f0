"""The step benchmark on a tiny work, through the same code; the comparison on made-up systems."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"
KEYS = [
    "system",
    "version",
    "work",
    "step_s_median",
    "step_s_min",
    "step_s_max",
    "gen_s_median",
    "update_s_median",
    "tokens_per_s",
    "first_step_s",
    "peak_rss_gib",
    "steps",
    "notes",
]  # what the other systems' scripts print


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


step, compare, tail = load("step"), load("compare"), load("tail")


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_tiny_step_measures_real_work(algorithm, capsys):
    assert step.main(["--algorithm", algorithm, "--work", "tiny", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert set(result) == {*KEYS, "compile_s", "algorithm"}
    assert result["algorithm"] == algorithm
    assert result["steps"] == 2
    assert 0 < result["gen_s_median"] + result["update_s_median"] < result["step_s_median"] * 1.5
    assert result["step_s_min"] <= result["step_s_median"] <= result["step_s_max"] < result["first_step_s"]
    assert result["tokens_per_s"] == pytest.approx(64 * 8 / result["step_s_median"], rel=0.05)
    assert "0 programs compiled in timed steps" in result["notes"]
    assert ("4 updates/step" if algorithm == "ppo" else "8 prompts x 8, 1 updates/step") in result["notes"]
    assert result["work"] in step.readable(result)


def test_a_step_that_moves_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(
        step,
        "settings",
        lambda *args, _plain=step.settings: dataclasses.replace(
            _plain(*args),
            ppo=dataclasses.replace(
                _plain(*args).ppo,
                policy_optimizer=dataclasses.replace(_plain(*args).ppo.policy_optimizer, learning_rate=1e-30),
            ),
        ),
    )
    with pytest.raises(AssertionError, match="tensors did not move"):
        step.run(step.WORKS["tiny"], "grpo", "sampler", warmup=0, steps=1, seed=0)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_flops_against_a_count_by_hand(algorithm):
    work = step.Work(layers=1, width=1, heads=1, hidden=1, vocab=10, batch=8, prompt=2, response=2, warmup=0, steps=1)
    flops = step.matmul_flops(work, step.settings(work, algorithm, "sampler"))
    # A token through the block: 4 + 3 multiply-adds and 2 for each token it attends to; through the head: 10.
    first, second, third, head = 2 * (7 + 2), 2 * (7 + 4), 2 * (7 + 6), 2 * 10
    prompts = 1 if algorithm == "grpo" else 8
    assert flops["gen"] == prompts * (first + second) + 8 * third + (prompts + 8) * head
    critic = prompts * first + 8 * (second + third)  # the last token of a prompt is fed once an answer
    scored = critic + 8 * 2 * head
    assert flops["score"] == scored + (critic if algorithm == "ppo" else 0)
    assert flops["update"] == 3 * (2 * (scored + critic) if algorithm == "ppo" else scored)


def test_the_works_are_those_of_the_other_systems():
    assert dataclasses.astuple(step.WORKS["S"]) == (4, 256, 8, 1024, 4096, 64, 32, 64, 2, 6)
    assert dataclasses.astuple(step.WORKS["M"]) == (12, 768, 12, 2048, 32000, 8, 64, 64, 1, 3)
    batch = next(step.prompt_batches(step.WORKS["S"], 64, 0))
    assert batch.tokens.shape == (64, 32)
    assert len(np.unique(batch.tokens)) > 1000


def test_the_tail_is_that_of_the_stop_token_and_slots_draw_the_same_lengths(capsys):
    command = ["--prompts", "2", "--mean", "8", "--cap", "32", "--slots", "4", "--rounds", "1", "--json"]
    assert tail.main(command) == 0
    rows = {row["way"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows)[:2] == ["all at once", "slots=4"]
    for row in rows.values():
        assert 4 < row["length_mean"] < 16
        assert 10 < row["length_max"] <= 32
    assert rows["slots=4"]["length_mean"] == rows["all at once"]["length_mean"]


def fake(path: Path, system: str, seconds: float, *, fails: bool = False) -> None:
    """A script that prints a benchmark's line without doing its work."""
    result = {key: seconds for key in compare.COLUMNS if key != "compile_s"} | {"system": system, "version": "1"}
    path.write_text(
        "raise SystemExit('boom')"
        if fails
        else f"import json, sys\nassert '--work' in sys.argv\nprint('noise')\nprint(json.dumps({result!r}))\n"
    )


def test_compare_sets_systems_side_by_side(tmp_path, monkeypatch, capsys):
    fake(tmp_path / "own.py", "ours", 2.0)
    fake(tmp_path / "trl_ppo.py", "trl", 5.0)
    fake(tmp_path / "tunix_ppo.py", "tunix", 0.0, fails=True)
    for name in ("ppo", "tun"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(compare, "OWN", tmp_path / "own.py")
    output = tmp_path / "rows.jsonl"
    compare.main(
        [
            "--peers",
            str(tmp_path),
            "--environments",
            str(tmp_path),
            "--works",
            "S",
            "--algorithms",
            "ppo",
            "--rounds",
            "2",
            "--output",
            str(output),
        ]
    )
    printed = capsys.readouterr().out
    assert "| ours " in printed
    assert "2.50x" in printed
    assert "tunix_ppo.py ended with exit code 1: boom" in printed
    assert [json.loads(line)["system"] for line in output.read_text().splitlines()] == ["ours", "trl"]


def test_compare_without_peers_says_so(tmp_path, monkeypatch):
    fake(tmp_path / "own.py", "ours", 2.0)
    monkeypatch.setattr(compare, "OWN", tmp_path / "own.py")
    rows, remarks = compare.compare("S", "grpo")
    assert [row["system"] for row in rows] == ["ours"]
    assert "not given" in remarks[0]
    _, remarks = compare.compare("S", "grpo", peers=tmp_path, environments=tmp_path)
    assert len(remarks) == 2
    assert "trl_grpo.py not run" in remarks[0]
