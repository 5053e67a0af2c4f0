"""The benchmarks on tiny works, through the same code; the comparison on made-up systems."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benchmarks import cases, ceilings, compare, costs, instruct, rollouts, step, uneven
from rlaif_jax.data.tokenizers import load_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import load_model, save_model
from tests.data.token_folders import byte_tokenizer_folder

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


TINY = step.Work(layers=1, width=16, heads=2, hidden=32, vocab=64, batch=512, prompt=4, response=32, warmup=1, steps=3)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    known = ceilings.Ceilings(flops=1e12, read=1e11, copy=1e10)
    for module in (step, rollouts, cases):
        monkeypatch.setattr(module, "measure", lambda dtype: known)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_tiny_step_measures_real_work(algorithm, capsys):
    assert step.main(["--algorithm", algorithm, "--work", "tiny", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    roofs = {"gen_roofline", "score_roofline", "update_roofline"}
    assert set(result) == {*KEYS, *roofs, "compile_s", "algorithm"}
    assert all(0 <= result[name] < 1 for name in roofs)
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
    work = step.Work(layers=2, width=1, heads=1, hidden=1, vocab=10, batch=8, prompt=2, response=2, warmup=0, steps=1)
    flops = step.matmul_flops(work, step.settings(work, algorithm, "sampler"))
    # A token through a block: 4 + 3 multiply-adds and 2 for each token it attends to, and through the head 10. The first
    # token's hidden state is not read: of the last block it needs the 2 for its key and its value.
    first, second, third, head = 2 * (7 + 2 + 2), 2 * 2 * (7 + 4), 2 * 2 * (7 + 6), 2 * 10
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


def test_the_cost_of_a_rollout_against_a_count_by_hand():
    work = step.Work(layers=1, width=1, heads=1, hidden=1, vocab=10, batch=4, prompt=2, response=3, warmup=0, steps=1)
    cost = costs.rollout_cost(work, np.array([[1, 3], [2, 2]]))
    # Two prompts: of the first token nothing but key and value is needed, the second takes 7 multiply-adds in the block and
    # sees 2 columns at 2 each; the head takes 10.
    assert cost.prefill == 2 * (2 * 2 + 2 * (7 + 4) + 2 * 10)
    assert cost.decode == 4 * 2 * (7 + 10)  # the last token of an answer is not fed: 0 + 2 + 1 + 1
    assert cost.attention == 2 * 2 * (3 + 4 + 3 + 3)  # columns seen
    assert cost.steps == 2
    assert cost.weights == 4 * (7 + 10)
    # The first prompt's two columns are read in two steps, the second's in one, for both of its answers.
    assert cost.cache == 4 * 2 * ((2 + 2) + 2 + (1 + 2) + 1 + 1)
    assert cost.seconds(ceilings.Ceilings(flops=2, read=1, copy=1)) == 92 / 2 + max(136 / 2, 2 * 68) + max(52 / 2, 88)
    assert cost.seconds(ceilings.Ceilings(flops=1, read=4, copy=1)) == 92 + max(136, 2 * 68 / 4) + max(52, 88 / 4)


def test_rooflines_are_the_least_time_over_the_time_taken():
    work = step.WORKS["tiny"]
    config = step.settings(work, "grpo", "sampler")
    flops = step.matmul_flops(work, config)
    took = {"step": 8.0, "gen": 4.0, "score": 2.0, "update": 2.0}
    shares = step.rooflines(work, config, took, ceilings.Ceilings(flops=flops["score"], read=1e30, copy=1))
    assert shares["score_roofline"] == 0.5
    assert shares["update_roofline"] == pytest.approx(3 * 0.5)
    assert shares["gen_roofline"] == pytest.approx(flops["gen"] / flops["score"] / 4, abs=1e-3)


def test_ceilings_are_measured():
    measured = ceilings.measure("bfloat16", side=64, size=2**20)
    assert all(x > 0 for x in measured)
    assert "GFLOP/s, read" in str(measured)


def test_the_wished_lengths():
    t = np.arange(1, 257)
    chances = {name: rollouts.distribution(rollouts.CASES[name]) for name in ("F", "T1", "T2", "G")}
    for p in chances.values():
        assert p.min() >= 0 and p.sum() == pytest.approx(1)
    assert chances["F"][-1] == 1 and len(chances["F"]) == 64
    assert chances["T1"][:18].sum() == pytest.approx(0.46, abs=0.01)  # the median of exp(N) is 32 / sqrt(e) = 19.4
    assert chances["T1"] @ t == pytest.approx(32, rel=0.02)
    assert chances["T2"][-1] == pytest.approx(0.1)
    assert chances["T2"] @ t == pytest.approx(0.9 * 16.5 + 0.1 * 256)
    assert chances["G"][1] / chances["G"][0] == pytest.approx(1 - 1 / 64)


@pytest.mark.parametrize("lengths, mean", [("mixed", math.nan), ("lognormal", 8)])
def test_the_policy_draws_the_wished_lengths(lengths, mean):
    case = rollouts.Case(TINY, lengths, mean)
    chances = rollouts.distribution(case)
    model, params = rollouts.stopping_policy(TINY, chances)
    draw = rollouts.ours(model, params, TINY, 64)
    drawn = np.concatenate([draw(turn).sum(-1) for turn in range(8)])  # 4096 answers
    wished = chances @ np.arange(1, 33)
    spread = math.sqrt(chances @ (np.arange(1, 33) - wished) ** 2)
    assert drawn.mean() == pytest.approx(wished, abs=4 * spread / 64)
    assert (drawn == 32).mean() == pytest.approx(chances[-1], abs=4 * math.sqrt(chances[-1] / 4096))
    rollouts.check_lengths(chances, drawn)
    with pytest.raises(AssertionError, match="mean length"):
        rollouts.check_lengths(chances, drawn + 1)
    with pytest.raises(AssertionError, match="share at the cap"):
        rollouts.check_lengths(chances, np.where(drawn == 32, 31, drawn))


def test_transformers_draws_them_from_the_same_weights():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    work = dataclasses.replace(TINY, batch=128, steps=2)
    result = rollouts.run("T2", rollouts.Case(work, "mixed"), "transformers")  # checks them
    assert result["system"] == "transformers" and result["length_max"] == 32
    assert result["occupancy"] == pytest.approx(1 - result["padding"], abs=2e-3)


@pytest.mark.parametrize("slots", [8, 16])
def test_steps_in_slots_are_those_of_the_engine(slots, monkeypatch):
    steps, plain = [], CausalLM.decode_step

    def counted(*args, **options):
        jax.debug.callback(lambda: steps.append(1))
        return plain(*args, **options)

    monkeypatch.setattr(CausalLM, "decode_step", counted)
    work = dataclasses.replace(TINY, batch=40)
    model, params = rollouts.stopping_policy(work, rollouts.distribution(rollouts.Case(work, "geometric", 8)))
    lengths = rollouts.ours(model, params, work, slots)(0).sum(-1)
    jax.effects_barrier()
    assert len(set(lengths)) > 8
    assert len(steps) == rollouts.steps_in_slots(lengths.tolist(), slots)


def test_the_rollouts_of_a_case(capsys):
    command = ["--case", "V32k", "--prompts", "1", "--prompt", "3", "--cap", "4", "--rounds", "1", "--json"]
    assert rollouts.main(command) == 0
    row = json.loads(capsys.readouterr().out)
    assert {*KEYS, "compile_s", "gen_roofline", "occupancy", "padding"} - {"update_s_median"} <= set(row)
    assert (row["system"], row["length_mean"], row["occupancy"], row["padding"]) == ("all at once", 4, 1, 0)
    assert "1 prompts x 8, 3 + at most 4 tokens" in row["notes"]
    for wrong in (["--case", "F", "--mean", "3"], ["--system", "transformers", "--slots", "4"]):
        with pytest.raises(SystemExit):
            rollouts.main(wrong)


OWN_KEYS = ("compile_s", "gen_roofline", "score_roofline", "update_roofline", "occupancy", "padding")


def fake(path: Path, system: str, seconds: float, *, fails: bool = False) -> None:
    """A script that prints a benchmark's line without doing its work."""
    result = {key: seconds for key in compare.COLUMNS if key not in OWN_KEYS} | {"system": system, "version": "1"}
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
    monkeypatch.setattr(compare, "STEP", (str(tmp_path / "own.py"),))
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
    assert "| S ppo | ours " in printed
    assert "occupancy" not in printed  # no rollouts
    assert "2.50x" in printed
    assert "tunix_ppo.py ended with exit code 1: boom" in printed
    assert [json.loads(line)["system"] for line in output.read_text().splitlines()] == ["ours", "trl"]


def test_compare_without_peers_says_so(tmp_path):
    systems, missing = compare.step_commands("S", "grpo", None, None)
    assert len(systems) == 1
    assert "not given" in missing[0]
    systems, missing = compare.step_commands("S", "grpo", tmp_path, tmp_path)
    assert len(systems) == 1 and len(missing) == 2
    assert "trl_grpo.py not run" in missing[0]


def test_a_work_that_is_not_in_their_tables_is_put_there(tmp_path):
    script = tmp_path / "tunix_grpo.py"
    script.write_text(
        "import argparse, json\n"
        "WORK = {'S': dict(vocab=1)}\n"
        "def main():\n"
        "    p = argparse.ArgumentParser()\n"
        "    p.add_argument('--work', choices=WORK)\n"
        "    w = WORK[p.parse_args().work]\n"
        "    print(json.dumps({'system': 'other', 'version': '1', 'step_s_median': float(w['vocab'])}))\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    python = tmp_path / "tun" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    for work, vocab in (("V", 152_000), ("S", 1)):  # S is what they say
        systems, _ = compare.step_commands(work, "grpo", tmp_path, tmp_path)
        assert compare.run_json(*systems[1])["step_s_median"] == vocab


def test_one_table_of_steps_and_rollouts(tmp_path, monkeypatch, capsys):
    fake(tmp_path / "own.py", "ours", 2.0)
    result = {"system": "made up", "version": "1", "step_s_median": 3.0, "occupancy": 0.25}
    (tmp_path / "rollouts.py").write_text(
        "import json, sys\n"
        "slots = '--slots' in sys.argv\n"
        f"print(json.dumps({result!r} | {{'system': 'slots' if slots else 'all', 'step_s_median': 1 + slots}}))\n"
    )
    monkeypatch.setattr(compare, "STEP", (str(tmp_path / "own.py"),))
    monkeypatch.setattr(compare, "ROLLOUTS", (str(tmp_path / "rollouts.py"),))
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert compare.main(["--works", "S", "--algorithms", "ppo", "--rollouts", "T1", "--slots", "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:4] for line in printed if line.startswith("| ")][2:] == [
        [" S ppo ", " ours   ", " 1.00x      "],
        [" T1    ", " all    ", " 1.00x      "],
        [" T1    ", " slots  ", " 2.00x      "],
    ]
    assert "no generate of transformers" in printed[-1]


def test_one_update_both_ways(monkeypatch):
    work = dataclasses.replace(step.WORKS["tiny"], response=16)
    lengths = {fill: cases.spread_lengths(work, fill) for fill in (0.25, 0.5, 1)}
    assert {fill: x.mean() / 16 for fill, x in lengths.items()} == {fill: pytest.approx(fill) for fill in lengths}
    assert (lengths[0.5].min(), lengths[0.5].max(), lengths[1].min()) == (1, 15, 16)
    packed, padded = (cases.update_alone(work, 0.5, way, warmup=0, steps=1) for way in cases.WAYS["U50"])
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-4) != 0
    assert packed["padding"] == padded["padding"] == 0.5
    assert 0 <= packed["update_roofline"] < 1


def test_flops_of_uneven_answers_are_those_of_their_tokens():
    work = step.Work(layers=1, width=1, heads=1, hidden=1, vocab=10, batch=2, prompt=2, response=3, warmup=0, steps=1)
    blocks, head = costs.trained_flops(work, np.array([[1, 3]]))
    # Of the first column key and value once; the second, fed once an answer, and two more of the longer one: 7 and 2 for each
    # column seen.
    assert blocks == 2 * (2 + 2 * (7 + 4) + (7 + 6) + (7 + 8))
    assert head == 2 * 4 * 10


@pytest.mark.parametrize("way", ["ahead", "waiting"])
def test_a_judge_is_waited_for(way):
    pytest.importorskip("openai")
    result = cases.judged_steps(
        step.WORKS["tiny"], way, delay=0.02, warmup=1, steps=1
    )  # checks judgements and staleness
    assert result["system"] == way
    phases = [result[f"{name}_s_median"] for name in ("gen", "feedback", "update")]
    assert sum(phases) == pytest.approx(result["step_s_median"], abs=1e-3)
    assert way == "ahead" or result["feedback_s_median"] >= 0.02


def test_cases_are_rows_of_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "cases.py").write_text(
        "import json, sys\n"
        "way = sys.argv[sys.argv.index('--way') + 1]\n"
        "print(json.dumps({'system': way, 'version': '1', 'step_s_median': 1.0 + (way == 'padded')}))\n"
    )
    monkeypatch.setattr(compare, "CASES", (str(tmp_path / "cases.py"),))
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert compare.main(["--works", "--cases", "U25", "E"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:4] for line in printed if line.startswith("| U")] == [
        [" U25  ", " packed ", " 1.00x      "],
        [" U25  ", " padded ", " 2.00x      "],
    ]
    assert "openai" in printed[-1]
    with pytest.raises(SystemExit):
        cases.main(["--case", "U25", "--way", "ahead"])


def test_compare_keeps_the_table_when_a_case_fails(tmp_path, monkeypatch, capsys):
    fake(tmp_path / "own.py", "ours", 2.0)
    fake(tmp_path / "rollouts.py", "", 0.0, fails=True)
    monkeypatch.setattr(compare, "STEP", (str(tmp_path / "own.py"),))
    monkeypatch.setattr(compare, "ROLLOUTS", (str(tmp_path / "rollouts.py"),))
    assert compare.main(["--works", "S", "--algorithms", "ppo", "--rollouts", "T1"]) == 1
    printed = capsys.readouterr().out
    assert "| S ppo | ours " in printed
    assert "rollouts.py ended with exit code 1: boom" in printed


def test_uneven_steps_are_the_same_work_both_ways(monkeypatch):
    monkeypatch.setattr(uneven, "SLOTS", 16)
    monkeypatch.setattr(uneven, "ROWS", 2)
    case = rollouts.Case(dataclasses.replace(TINY, batch=64), "mixed")
    policy = rollouts.stopping_policy(case.work, rollouts.distribution(case))
    padded, packed = (uneven.ours(case, way, *policy, warmup=0, steps=1) for way in ("padded", "packed"))
    assert uneven.way_settings(case, "packed").ppo.packed_rows == 2
    assert abs(padded["length_mean"] - packed["length_mean"]) < 1, "the same draws up to rounding"
    assert padded["length_max"] == packed["length_max"] == 32
    for way in uneven.peers(case.work):
        missing = uneven.peer(case, way, Path(sys.executable), "nowhere", warmup=1, steps=1)
        assert isinstance(missing, str), "what could not be run is a remark, not a row"


def test_other_systems_get_the_weights_and_what_to_expect_of_them(tmp_path):
    case = rollouts.Case(TINY, "mixed")
    model, params = rollouts.stopping_policy(TINY, rollouts.distribution(case))
    uneven.save_policy(str(tmp_path / "policy"), model, params, TINY)
    expected = np.load(tmp_path / "policy" / "expected.npz")
    assert expected["tokens"].shape == (2, 36) and expected["tokens"].min() >= 2, "no padding and no stop among them"
    theirs, weights = load_model(tmp_path / "policy")
    logits = theirs(weights, expected["tokens"], np.ones((2, 36), bool))
    logprobs = jax.nn.log_softmax(logits)[:, 3:-1]
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(logprobs), expected["tokens"][:, 4:, None], axis=-1)[..., 0],
        expected["logprobs"],
        atol=1e-4,
    )


def test_an_instruct_model_takes_real_steps(tmp_path, capsys):
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": template}
    words = byte_tokenizer_folder(tmp_path / "words", "</s>", "<|user|>", "<|assistant|>", tokenizer_config=settings)
    tokenizer = load_tokenizer(words)
    model = CausalLM(
        small_decoder(tokenizer.vocab_size, num_layers=13, width=16, num_heads=2, context_length=160, mlp_width=32)
    )
    save_model(tmp_path / "model", model, model.init(jax.random.key(0)), tokenizer)
    tasks = [{"instruction": f"Say {letter}.", "instances": [{"input": ""}]} for letter in "abcdefghi"]
    tasks += [{"instruction": "Say it." * 20, "instances": [{"input": "long"}]}]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    asked = instruct.questions(tmp_path / "tasks.jsonl", tokenizer)
    assert [x["prompt"] for x in asked[:1]] == ["<|user|>Say a. Answer in one short sentence.<|assistant|>"]
    assert len(asked) == 9
    options = ["--dtype", "bfloat16", "--steps", "1", "--json"]
    assert instruct.main([str(tmp_path / "model"), str(tmp_path / "tasks.jsonl"), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    phases = result["gen_s_median"] + result["score_s_median"] + result["update_s_median"]
    assert phases == pytest.approx(result["step_s_median"], abs=0.03)
    assert len(result["rewards"]) == 2
    assert 1 <= result["mean_length"] <= 48
    assert 0 < result["sampler_gap"] < 5e-2
    assert [instruct.one_sentence({}, text) for text in ("A cat.", "A cat", "A. Cat.", "a " * 20 + "b.")] == [
        1,
        0,
        0,
        0,
    ]
