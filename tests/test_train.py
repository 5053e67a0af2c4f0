"""The loop as a person runs it: to the end, killed and resumed, stopped, and fed bad input."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlaif_jax.checkpoint import Checkpointer
from rlaif_jax.command_line import command_line
from rlaif_jax.config import UserError
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.readers import jsonl_records
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.sources import FeedbackSource, FunctionSource
from rlaif_jax.metrics import read_metrics
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import JitRunner
from rlaif_jax.policies.base import Draw, to_prompts
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.steps import PendingRollout, collect
from rlaif_jax.types import Frozen
from tests import tiny
from tests.tiny import PROMPTS, leaves, numbers

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return tiny.write_prompts(tmp_path_factory.mktemp("data"))


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "tests.tiny", *options]


def environment(devices: int = 1) -> dict[str, str]:
    """One device as on a laptop, or more: the resumed process must not depend on this one."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory) -> Path:
    """Twenty steps in one go."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command("--prompts", str(prompts), "--out", str(out)), env=environment(), check=True, timeout=300)
    return out


def test_a_run_leaves_what_was_promised(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["steps"] == 20
    assert set(summary["checks"]) == {
        "first_minibatch_ratio_is_1",
        "first_minibatch_clip_fraction_is_0",
        "first_minibatch_approx_kl_is_0",
        "sampler_and_trainer_logprobs_agree",
        "eos_is_kept_in_the_mask",
        "losses_are_finite",
        "kl_at_step_0_is_0",
    }
    assert all(summary["checks"].values())
    lines = numbers(whole)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert np.mean([line["reward"] for line in lines[-5:]]) > np.mean([line["reward"] for line in lines[:5]]) + 0.3
    assert "report.html" in os.listdir(whole)
    compiled = [line["time/compilations"] for line in read_metrics(whole / "metrics.jsonl")]
    assert compiled[-1] == compiled[4], "programs are compiled in the first steps only"


def started(out: Path, options: tuple[str, ...], lines: int) -> subprocess.Popen[str]:
    """A run as a process that has written `lines` lines of numbers."""
    process = subprocess.Popen(
        command(*options, "--out", str(out)), env=environment(), stderr=subprocess.PIPE, text=True
    )
    for _ in range(3000):
        if (out / "metrics.jsonl").exists() and len(read_metrics(out / "metrics.jsonl")) >= lines:
            break
        time.sleep(0.02)
    return process


def test_stopped_killed_and_resumed_is_the_same_run_bit_for_bit(whole, prompts, tmp_path):
    out, options = tmp_path / "resumed", ("--prompts", str(prompts))
    process = started(out, options, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "--resume" in errors
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert (out / "checkpoints" / str(summary["steps"])).is_dir()
    (out / "final.npz").unlink(missing_ok=True)  # it is not written by a run that was stopped in a rollout

    process = started(out, (*options, "--resume"), 8)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = numbers(out)
    assert 8 <= len(before) < 20, "the run was to be killed in its middle"
    assert not (out / "final.npz").exists()

    subprocess.run(command(*options, "--out", str(out), "--resume"), env=environment(), check=True, timeout=300)
    assert numbers(out) == numbers(whole)
    assert all(np.array_equal(a, b) for a, b in zip(leaves(out), leaves(whole)))
    assert json.loads((out / "summary.json").read_text())["status"] == "done"


def resumed_from(step: int, done: Path, options: tuple[str, ...], env: dict[str, str]) -> Path:
    """A copy of a finished run without what came after the checkpoint of `step`, resumed to its end."""
    out = done.with_name("resumed")
    shutil.copytree(done, out)
    (out / "final.npz").unlink()
    written = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(written[:step]))
    saved = {path.name for path in (out / "checkpoints").iterdir()}
    assert str(step) in saved
    for name in saved - {str(step)}:
        shutil.rmtree(out / "checkpoints" / name)
    subprocess.run(command(*options, "--out", str(out), "--resume"), env=env, check=True, timeout=300)
    return out


@pytest.mark.slow
def test_a_run_on_a_mesh_resumes_bit_for_bit(prompts, tmp_path):
    mesh = ("--train.parallel.mode", "shard", "--train.parallel.fsdp", "2", "--train.parallel.tensor", "2")
    options = ("--prompts", str(prompts), "--train.steps", "4", "--train.save-every", "2", *mesh)
    done, four = tmp_path / "done", environment(devices=4)
    subprocess.run(command(*options, "--out", str(done)), env=four, check=True, timeout=300)
    resumed = resumed_from(2, done, options, four)
    assert [line["step"] for line in numbers(done)] == [1, 2, 3, 4]
    assert numbers(resumed) == numbers(done)
    assert all(np.array_equal(a, b) for a, b in zip(leaves(resumed), leaves(done)))


def test_one_step_off_policy_learns_and_resumes_bit_for_bit(whole, prompts, tmp_path):
    """The answers of step k are those of the policy of step k - 2; a checkpoint keeps those that are on their way."""
    options = ("--prompts", str(prompts), "--train.staleness", "1", "--train.rollout-parts", "2", "--train.steps", "10")
    done = tmp_path / "done"
    subprocess.run(command(*options, "--out", str(done)), env=environment(), check=True, timeout=300)
    lines = numbers(done)
    assert [line["staleness"] for line in lines] == [0.0] + [1.0] * 9
    assert lines[0]["first/effective_sample_size"] > 1 - 1e-5
    assert all(0.3 < line["first/effective_sample_size"] < 1 - 1e-5 for line in lines[1:])
    assert lines[0]["score"] == numbers(whole)[0]["score"], "the first step is the synchronous one"
    assert np.mean([line["reward"] for line in lines[-5:]]) > np.mean([line["reward"] for line in lines[:5]]) + 0.3
    resumed = resumed_from(5, done, options, environment())
    assert numbers(resumed) == lines
    assert all(np.array_equal(a, b) for a, b in zip(leaves(resumed), leaves(done)))


def test_a_step_in_parts_has_the_same_answers_and_hands_them_over_as_they_come(prompts):
    tokenizer = word_level_tokenizer(tiny.WORDS)
    model = CausalLM(small_decoder(tokenizer.vocab_size, num_layers=1, width=16, num_heads=2, context_length=16))
    policy = TextPolicy(model, SamplingConfig(max_new_tokens=5), tokenizer.eos_id, tokenizer.pad_id)
    params = model.init(jax.random.key(0))
    roll = jax.jit(lambda prompts: policy.sample(params, Frozen(), prompts, jax.random.key(1), (Draw(2),)))
    batch = next(prompt_batches(jsonl_records(prompts), tokenizer, batch_size=8, seed=0, prompt_length=6))
    handed: list[list[str]] = []

    class Judge(FeedbackSource):
        def prefetch(self, records, answers):
            assert [record["prompt"] for record in records][::2] == [r["prompt"] for r in batch.records][
                len(handed) * 4 :
            ][:4]
            handed.append(list(answers))

    def collected(parts, judge):
        size = 8 // parts
        rollouts = [roll(to_prompts(batch.rows(slice(at, at + size)))) for at in range(0, 8, size)]
        return collect(PendingRollout(None, batch, rollouts), policy, tokenizer, judge)

    whole, records, answers = collected(1, FunctionSource(lambda record, answer: 0.0))
    again, records_again, answers_again = collected(2, Judge())
    assert (records_again, answers_again) == (records, answers)
    assert len(records) == len(answers) == 16
    assert handed == [answers[:8], answers[8:]]
    chex.assert_trees_all_close(again, whole, atol=1e-6)


def test_a_person_may_say_enough(prompts, tmp_path, monkeypatch):
    asked = iter([False, True])
    monkeypatch.setattr(tiny, "train", functools.partial(tiny.train, enough=lambda: next(asked)))
    monkeypatch.setattr("rlaif_jax.train.make_runner", lambda parallel, rules: JitRunner())
    tiny.main(tiny.TinyConfig(prompts=prompts, out=tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("done", 2)
    assert (tmp_path / "out" / "checkpoints" / "2").is_dir()


# ---- Bad input: each gives one clear message that names the place, exit code 2, and no half-written run


@dataclasses.dataclass(frozen=True)
class Bad:
    """Options, how to spoil the files first, and what the message must name; `choice` is the class of a union."""

    options: tuple[str, ...] = ()
    choice: tuple[str, ...] = ()
    prompts: str | None = None
    spoil: str = ""
    names: tuple[str, ...] = ()


GOOD = "".join(json.dumps(p) + "\n" for p in PROMPTS)
BAD = {
    "misspelt option": Bad(("--train.stepz", "5"), names=("train.stepz",)),
    "wrong type": Bad(("--train.steps", "many"), names=("train.steps",)),
    "zero steps": Bad(("--train.steps", "0"), names=("train.steps", "0")),
    "negative learning rate": Bad(("--ppo.policy-optimizer.learning-rate", "-1"), names=("learning_rate", "-1")),
    "missing prompt file": Bad(("--prompts", "nowhere.jsonl"), names=("nowhere.jsonl",)),
    "empty prompt file": Bad(prompts="", names=("prompts.jsonl",)),
    "malformed JSONL at line 3": Bad(prompts=GOOD[:42] + '{"prompt": \n' + GOOD[42:], names=("prompts.jsonl:3",)),
    "record without prompt": Bad(
        prompts=GOOD + '{"text": "a"}\n', names=(f"prompts.jsonl:{len(PROMPTS) + 1}", "prompt")
    ),
    "prompt of no tokens": Bad(prompts=GOOD + '{"prompt": ""}\n', names=("prompt", "no tokens")),
    "prompt longer than prompt_length": Bad(prompts=GOOD + '{"prompt": "a b c d e f g h"}\n', names=("8 tokens", "6")),
    "longer than the context": Bad(("--sampling.max-new-tokens", "40"), names=("46", "context of 16")),
    "batch larger than the data": Bad(("--train.prompts-per-step", "64"), names=("64", "36")),
    "more prompts drawn than there are": Bad(
        ("--train.oversample", "3", "--ppo.answers-per-prompt", "2"), names=("48", "36")
    ),
    "fewer batches than steps": Bad(("--epochs", "2"), names=("train.steps is 20", "after 4 batches", "epochs=None")),
    "K=1 for a group method": Bad(
        ("--ppo.kl-in", "loss"), ("ppo.advantage:group-normalised",), names=("answers_per_prompt is 1",)
    ),
    "K=1 for leave-one-out": Bad(
        ("--ppo.kl-in", "loss"), ("ppo.advantage:leave-one-out",), names=("answers_per_prompt is 1", "LeaveOneOut")
    ),
    "oversampling by nothing": Bad(("--train.oversample", "0"), names=("train.oversample", "0")),
    "K=1 for oversampling": Bad(
        ("--train.oversample", "2"), names=("train.oversample is 2", "one answer", "2 or more")
    ),
    "two steps off-policy": Bad(("--train.staleness", "2"), names=("train.staleness", "2")),
    "off-policy by the sampler's log-probs": Bad(
        ("--train.staleness", "1", "--ppo.behaviour", "sampler"), names=("ppo.behaviour",)
    ),
    "ratio of answers, advantages of tokens": Bad(
        choice=("ppo.ratio:answer-ratio",), names=("ppo.ratio=AnswerRatio", "GAE")
    ),
    "estimator that does not exist": Bad(choice=("ppo.advantage:median",), names=("ppo.advantage", "group-normalised")),
    "never saved": Bad(("--train.save-every", "0"), names=("train.save_every", "0")),
    "negative seed": Bad(("--seed", "-1"), names=("seed", "-1")),
    "mesh options without a mesh": Bad(("--train.parallel.fsdp", "2"), names=("parallel.mode",)),
    "batch that the devices do not divide": Bad(("--train.prompts-per-step", "12"), names=("12", "8 devices")),
    "parts that do not divide": Bad(("--train.rollout-parts", "3"), names=("rollout_parts (3)", "16")),
    "minibatches that do not divide": Bad(
        ("--ppo.num-minibatches", "3"), names=("num_minibatches", "16 sequences", "3 minibatches")
    ),
    "greedy policy": Bad(("--sampling.temperature", "0"), names=("sampling.temperature",)),
    "truncated distribution, top_k": Bad(("--sampling.top-k", "5"), names=("sampling.top_k", "whole distribution")),
    "truncated distribution, top_p": Bad(("--sampling.top-p", "0.9"), names=("sampling.top_p", "temperature")),
    "top_p out of range": Bad(("--sampling.top-p", "1.5"), names=("sampling.top_p", "1.5")),
    "missing model folder": Bad(("--model", "no/such/folder"), names=("no/such/folder",)),
    "truncated safetensors": Bad(spoil="truncate", names=("model.safetensors",)),
    "missing tensor": Bad(spoil="drop", names=("model.safetensors", "norm.weight")),
    "tokenizer of another vocabulary": Bad(spoil="tokenizer", names=("vocabulary", "30", "40")),
    "run folder is a file": Bad(spoil="file", names=("out", "file")),
    "nothing to resume": Bad(("--resume",), names=("out", "resume")),
    "mesh larger than the machine": Bad(
        ("--train.parallel.mode", "shard", "--train.parallel.data", "64"), names=("64",)
    ),
}


def saved_model(folder: Path) -> None:
    model = CausalLM(small_decoder(30, num_layers=1, width=16, num_heads=2, context_length=16))
    save_model(folder, model, model.init(jax.random.key(0)))


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, prompts, tmp_path, monkeypatch, capsys):
    case = BAD[name]
    out, options = tmp_path / "out", list(case.options)
    file = tmp_path / "prompts.jsonl"
    file.write_text(GOOD if case.prompts is None else case.prompts)
    if "--prompts" not in options:
        options += ["--prompts", str(file)]
    if case.spoil in ("truncate", "drop", "tokenizer"):
        folder = tmp_path / "model"
        saved_model(folder)
        options += ["--model", str(folder)]
        weights = folder / "model.safetensors"
        if case.spoil == "truncate":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif case.spoil == "drop":
            tensors = load_file(weights)
            save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, weights)
        else:
            word_level_tokenizer(tuple(f"w{i}" for i in range(36))).save(tmp_path / "tokenizer")
            options += ["--tokenizer", str(tmp_path / "tokenizer")]
            file.write_text("".join(json.dumps({"prompt": f"w1 w{i}"}) + "\n" for i in range(16)))
    elif case.spoil == "file":
        out.write_text("not a folder")
    monkeypatch.setattr(sys, "argv", ["tiny", *options, "--out", str(out), *case.choice])
    with pytest.raises(SystemExit) as exit_:
        command_line(tiny.main, tiny.TinyConfig())
    message = " ".join(capsys.readouterr().err.split())
    assert exit_.value.code == 2, message
    assert "Traceback" not in message
    for part in case.names:
        assert part.replace("_", "-") in message.replace("_", "-"), message
    assert not out.is_dir() or not any(out.iterdir()), "no half-written run"


def test_checkpoint_of_another_config(whole, prompts, monkeypatch, capsys):
    options = ["--prompts", str(prompts), "--out", str(whole), "--resume", "--ppo.objective.clip-range", "0.3"]
    monkeypatch.setattr(sys, "argv", ["tiny", *options])
    with pytest.raises(SystemExit) as exit_:
        command_line(tiny.main, tiny.TinyConfig())
    errors = " ".join(capsys.readouterr().err.split())
    assert exit_.value.code == 2
    assert "clip_range was 0.2 and is now 0.3" in errors
    assert "Traceback" not in errors
    assert json.loads((whole / "summary.json").read_text())["status"] == "done", "the old run is left as it was"


def test_checkpoints_after_a_step_are_dropped(tmp_path):
    checkpoints = Checkpointer(tmp_path, {}, keep=3)
    for step in (2, 4, 6):
        checkpoints.save(step, {"x": np.full(3, step)}, {})
    assert checkpoints.drop_after(5) == f"the newest checkpoint that is left is that of step 4 in {tmp_path}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
    assert checkpoints.restore({"x": np.ones(3, int)}).arrays["x"].tolist() == [4, 4, 4]
    assert checkpoints.drop_after(1) == f"no checkpoint is left in {tmp_path}"
    assert checkpoints.latest() is None
    checkpoints.close()


def test_checkpoint_with_other_arrays(tmp_path):
    checkpoints = Checkpointer(tmp_path, {})
    checkpoints.save(1, {"stacked": np.ones((2, 3))}, {})
    checkpoints.close()
    checkpoints = Checkpointer(tmp_path, {})
    with pytest.raises(UserError, match=r"(?s)1: this checkpoint cannot be read.*another version of rlaif_jax"):
        checkpoints.restore({"one": np.ones(3), "two": np.ones(3)})
    checkpoints.close()
    assert (tmp_path / "1").is_dir()


def test_full_disk_keeps_what_was_computed(prompts, tmp_path):
    """A real limit on file sizes acts as a full disk: the checkpoint cannot be written."""
    out = tmp_path / "full"
    limited = f"ulimit -f 24; exec {' '.join(command('--prompts', str(prompts), '--out', str(out)))}"
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {limited}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    # The writer's threads print tracebacks of their own, sometimes after the message.
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(out) in message
    assert "a checkpoint cannot be written" in message
    assert "File too large" in message
    assert [line["step"] for line in numbers(out)] == list(range(1, 11)), "the numbers of all steps are kept"
