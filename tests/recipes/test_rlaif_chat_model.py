"""`train` on SmolLM2-135M-Instruct: each pair of settings is in a run that is killed and resumed bit for bit.

Each run is a process with one, two or eight fake devices. It takes 4 GiB with an adapter on one device, 8 GiB with all weights
on one device or an adapter on a mesh, and more than 10 GiB with all weights on several devices or an adapter on eight by
pmap: let nothing else run on a machine of 24 GiB. A case takes seven to ten minutes on a core.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.covering import Case, covering, one_by_one
from tests.recipes.resumed import assert_same_runs, checkpoint, summary

FEEDBACK = {
    "judge": "judge FOLDER min_mass=0 batch_size=2 max_length=256",
    "constraints": "constraints",
    "function": "function HERE/rewards.py:brevity",
}
SETTINGS: dict[str, dict[str, list[str]]] = {
    "layout": {
        "one device": ["--train.parallel.mode", "shard", "--train.parallel.data", "1"],
        "pmap": [],
        "mesh 2x2x2": [
            "--train.parallel.mode",
            "shard",
            *(f"--train.parallel.{axis}=2" for axis in ("data", "fsdp", "tensor")),
        ],
    },
    "learns": {"all weights": [], "an adapter": ["--lora", "--adapter.rank", "4"]},
    "rows": {"padded": ["--ppo.packed-rows", "0"], "packed": ["--ppo.packed-rows", "2"]},
    "dtype": {"float32": [], "bfloat16": ["--dtype", "bfloat16"]},
}
# Each layout has each kind: one alone and the other two together.
REWARDS = [
    entry
    for layout, kind in zip(SETTINGS["layout"], FEEDBACK)
    for entry in ((layout, "alone", kind), (layout, "two", *(other for other in FEEDBACK if other != kind)))
]
CASES = covering([*(one_by_one(SETTINGS[name]) for name in ("learns", "rows", "dtype")), REWARDS])
STEPS = 2


def devices(case: Case) -> int:
    """Returns the number of fake devices: pmap holds weights, gradients, moments and the reference 8 times on 8 of them.

    That is 22 GiB where all weights learn, so that two devices share such a run; an adapter leaves one copy of the weights
    on each of them.
    """
    return {"one device": 1, "pmap": 2 if "all weights" in case else 8, "mesh 2x2x2": 8}[case[3]]


def start(case: Case, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts `python -m rlaif_jax train` with the devices of a case."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices(case)}")
    command = [sys.executable, "-m", "rlaif_jax", "train", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def ended(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end of a run, which must be good."""
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()[-3000:]


def copy_after_first_step(process: subprocess.Popen[bytes], whole: Path, part: Path) -> None:
    """Copies the folder of a run, which is held meanwhile, when its first checkpoint is there: as `kill -9` leaves it."""
    while process.poll() is None and not (whole / "checkpoints" / "1").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    try:
        shutil.copytree(whole, part)
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def folder():
    """The folder of the model, or a skip."""
    found = os.environ.get("RLAIF_JAX_CHAT_MODEL")
    if not found:
        pytest.skip(
            "needs a chat model of half a gigabyte: set RLAIF_JAX_CHAT_MODEL to the folder of SmolLM2-135M-Instruct"
        )
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with prompts and a function."""
    path = tmp_path_factory.mktemp("inputs")
    constraints = [{"type": "max_words", "count": 3}, {"type": "without_word", "word": "the"}]
    with (path / "prompts.jsonl").open("w") as file:
        for animal, ask in itertools.product(
            ("cat", "dog", "fox", "owl"), ("Name a", "Draw a", "Describe a", "Praise a")
        ):
            file.write(json.dumps({"prompt": f"{ask} {animal}.", "constraints": constraints}) + "\n")
    (path / "rewards.py").write_text("def brevity(answer):\n    return -len(answer)\n")
    return path


def test_each_pair_of_settings_is_in_a_run():
    found = {frozenset(pair) for case in CASES for pair in itertools.combinations(case, 2)}
    settings = [*SETTINGS.values(), ("alone", "two"), FEEDBACK]
    wanted = {
        frozenset(pair) for one, two in itertools.combinations(settings, 2) for pair in itertools.product(one, two)
    }
    assert wanted <= found and len(CASES) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_killed_run_is_resumed_bit_for_bit(case, folder, inputs, tmp_path):
    learns, rows, dtype, layout, _, *kinds = case
    lines = [FEEDBACK[kind].replace("FOLDER", folder).replace("HERE", str(inputs)) for kind in kinds]
    settings = {"layout": layout, "learns": learns, "rows": rows, "dtype": dtype}
    whole, part = tmp_path / "whole", tmp_path / "part"
    # fmt: off
    run = start(
        case, "--policy", folder, "--prompts", str(inputs / "prompts.jsonl"), "--feedback",
        *(f"{line} weight={weight}" for line, weight in zip(lines, (1.0, -0.5))),
        *itertools.chain.from_iterable(SETTINGS[name][value] for name, value in settings.items()),
        "--held-out", "8", "--scale-answers", "8", "--out", str(whole), "--train.steps", str(STEPS),
        "--train.prompts-per-step", str(8 if layout == "pmap" else 4), "--train.prompt-length", "40",
        "--train.eval-every", str(STEPS), "--train.save-every", "1", "--sampling.max-new-tokens", "6",
        "--ppo.answers-per-prompt", "2", "--ppo.policy-optimizer.learning-rate", "1e-4",
        "--ppo.policy-optimizer.warmup-updates", "0",
    )
    # fmt: on
    copy_after_first_step(run, whole, part)
    ended(run)
    ended(start(case, "--resume", "--out", str(part)))
    found = summary(whole)
    assert found["status"] == "done" and all(found["checks"].values())
    last = assert_same_runs(whole, part, STEPS)
    first, _ = checkpoint(whole, 1)
    leaves = zip(*(jax.tree.leaves(arrays[0]["params"]) for arrays in (first, last)), strict=True)
    assert not any(np.array_equal(before, after) for before, after in leaves), "every weight learns"
