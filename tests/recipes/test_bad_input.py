"""Bad input of `python -m rlaif_jax TOOL`: exit code 2, one line that names it, and nothing lost."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rlaif_jax.__main__ import tool
from rlaif_jax.models.hf.files import load_with_tokenizer, save_model
from tests.feedback.api_server import Wrong, serve
from tests.recipes.faulty import EAT, HANG, REWARDS, arguments, ended, is_one_line, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    here = tmp_path_factory.mktemp("inputs")
    write_inputs(here)
    return here


@pytest.fixture(autouse=True)
def same_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # `tool` sets it


# ---- Before anything is computed

BEFORE = {
    # The model
    "no model": ("train --policy ''", "no model to train: give --policy"),
    "no such model": ("train --policy HERE/none/x/y", "no model at HERE/none/x/y: there is no such file or folder"),
    "a file that is no model": ("train --policy HERE/rewards.py", "HERE/rewards.py: load_model reads a model's folder"),
    "no config.json": ("train --policy HERE/no_config", "HERE/no_config: no config.json there"),
    "config.json is no JSON": ("train --policy HERE/config", "HERE/config/config.json: not JSON"),
    "unknown family": ("train --policy HERE/family", "config.json: model_type='mamba' is not supported; supported: gpt2"),
    "another shape": ("train --policy HERE/shape", "embed_tokens.weight has shape (25, 16); config.json asks for (25, 32)"),
    "weights cut": ("train --policy HERE/cut", "HERE/cut/model.safetensors: not a whole safetensors file: 15208 bytes of"),
    "weights of NaN": ("train --policy HERE/nan", "nan/model.safetensors: the tensor model.layers.0.self_attn.q_proj.weight"
                       " holds NaN or infinite numbers"),
    "damaged GGUF": ("train --policy HERE/cut.gguf", "cut.gguf: not a whole GGUF file: 48 bytes end within the header"),
    "no GGUF": ("train --policy HERE/word.gguf", "HERE/word.gguf is not a GGUF file: it does not begin with GGUF"),
    "an adapter for a model": ("train --policy HERE/adapter", "HERE/adapter/adapter_config.json: base_model_name_or_path (a re"
                               "lative path begins in the current folder): no model deep"),
    "an adapter for a reward model": ("train --feedback 'model HERE/adapter'", "it is the folder of an adapter, which is read"),
    "adapter of another base": ("generate --model HERE/lm --adapter HERE/adapter --prompt a", "has no place in the base "
                                "model (llama, 1 layers): the adapter is of another model"),
    "no tokenizer": ("train --policy HERE/no_tokenizer", "no tokenizer in the folder HERE/no_tokenizer: looked for"),
    "no such tokenizer": ("train --tokenizer HERE/none", "no tokenizer at HERE/none: there is no such file or folder"),
    "another vocabulary": ("train --policy HERE/small", "HERE/small: this tokenizer is of another vocabulary: it has 25 ids,"
                           " the model only 10"),
    "no end token": ("train --policy HERE/no_end", "HERE/no_end: no file declares an end token"),
    # Templates
    "no template": ("train --policy HERE/plain --template chat", "template=chat, but the tokenizer's files have no chat"),
    "system without template": ("train --policy HERE/plain --system x", "system is a message of a chat, and this model has"),
    "undefined variable": ("train --policy HERE/undefined", "undefined/tokenizer_config.json: the chat template does not "
                           "take a conversation of user: 'nothing' is undefined"),
    "template reaches for attributes": ("train --policy HERE/reach", "access to attribute '__class__' of 'str' object is un"),
    "no such variable": ("train --chat.variables word=a", "lm/tokenizer_config.json: the chat template takes no variable word"),
    "sft: no such variable": ("sft --out OUT --chat.variables word=a", "the chat template takes no variable word"),
    "reward model: no such template": ("reward-model --out OUT --chat.template no", "has no chat template no (it has default)"),
    "generate: no such variable": ("generate --model HERE/lm --chat.variables word=a --prompt a", "takes no variable word"),
    "no value": ("train --chat.variables enable_thinking", "chat.variables: 'enable_thinking' should be NAME=VALUE"),
    "an empty template": ("sft --out OUT --chat.template HERE/blank.txt", "chat.template: the file HERE/blank.txt is empty"),
    "template is not closed": ("train --policy HERE/unclosed", "it is malformed: line 1: Unexpected end of template"),
    # Prompts
    "no prompts": ("train --prompts ''", "no prompts: give --prompts, a .jsonl, .parquet or .txt file or tfds:NAME/SPLIT"),
    "no such prompts": ("train --prompts HERE/none.jsonl", "cannot read HERE/none.jsonl: No such file or directory"),
    "prompts are a folder": ("train --prompts HERE", "cannot read HERE: Is a directory"),
    "empty file": ("train --prompts HERE/empty.jsonl", 'HERE/empty.jsonl is empty: expected one JSON object a line, with "p'),
    "blank file": ("train --prompts HERE/blank.txt", "HERE/blank.txt holds no text"),
    "no UTF-8": ("train --prompts HERE/latin.txt", "HERE/latin.txt is no UTF-8 text"),
    "broken line": ("train --prompts HERE/broken.jsonl", "HERE/broken.jsonl:2: no valid JSON"),
    "no field prompt": ("train --prompts HERE/unnamed.jsonl", 'unnamed.jsonl:1: field "prompt" is missing; the line has "qu'),
    "prompt is a number": ("train --prompts HERE/number.jsonl", 'number.jsonl:1: field "prompt" should be a string, not 3'),
    "no such data set": ("train --prompts tfds:no_such_set/train", "there is no TFDS data set 'no_such_set'"),
    "no split": ("train --prompts tfds:imdb_reviews", "expected tfds:NAME/SPLIT"),
    "prompt over the length": ("train --prompts HERE/long.txt", "no prompt is left (1 left out: longer than "
                               "train.prompt_length (8 tokens))"),
    "over the context": ("train --sampling.max-new-tokens 900", "train.prompt_length (8) + sampling.max_new_tokens (900) = "
                         "908 is more than the policy's context of 512 tokens"),
    "all held out": ("train --held-out 64", "prompts.txt: 64 prompts are left, and held_out=64 of them are only measured on"),
    "too few for the devices": ("train --held-out 3", "prompts.txt: 0 held-out prompts are left; 8 are needed at least"),
    "held out is learned": ("train --eval-prompts HERE/prompts.txt", "no prompt is left (64 left out: the same prompt once"),
    "fewer than a step's": ("train --train.prompts-per-step 80", "prompts.txt: 56 prompts are left to learn on, fewer than "
                            "the 80 of a step"),
    "fewer than a step draws": ("train --train.prompts-per-step 32 --train.oversample 2", "56 prompts are left to learn on, "
                                "fewer than the 64 of a step (train.prompts_per_step x train.oversample)"),
    # Rewards
    "no feedback": ("train --feedback", "no feedback: give --feedback 'KIND ...'"),
    "no such reward": ("train --feedback 'jury x'", "--feedback 'jury x': there is no 'jury'; it is one of judge, api"),
    "an empty reward": ("train --feedback ''", "--feedback '' names no reward; it begins with one of judge, api"),
    "a weight alone": ("train --feedback weight=2", "--feedback 'weight=2' names no reward"),
    "open quote": ("train --feedback \"judge 'm\"", "cannot be split into words: No closing quotation"),
    "no such setting": ("train --feedback 'judge m colour=red'", "'colour=red' is no setting of judge; it has model, form"),
    "infinite rate": ("train --ppo.policy-optimizer.learning-rate inf", "optimizer.learning_rate must be finite, not inf"),
    "infinite penalty": ("train --ppo.kl-coef inf", "ppo.kl_coef must be >= 0 and finite, not inf"),
    "no such choice": ("train --feedback 'judge m form=score'", "form: should be one of rating, ranking, not 'score'"),
    "weight of NaN": ("train --feedback 'judge m weight=nan'", "weight: should be a number, not 'nan'"),
    "infinite weight": ("train --feedback 'judge m weight=inf'", "--feedback 'judge m weight=inf': the weight of a reward is a "
                        "number other than 0, not inf"),
    "weight 0": ("train --feedback 'judge m weight=0'", "the weight of a reward is a number other than 0"),
    "weight is a word": ("train --feedback 'judge m weight=heavy'", "weight: should be a number, not 'heavy'"),
    "second is no reward": ("train --second 'jury x'", "--second 'jury x': there is no 'jury'"),
    "no function": ("train --feedback 'function brevity'", "it is MODULE:FUNCTION or path/file.py:FUNCTION"),
    "unknown function": ("train --feedback 'function HERE/rewards.py:x'", "HERE/rewards.py has no 'x'; it has the functions "
                         "count_a, raises"),
    "no such file": ("train --feedback 'function HERE/none.py:f'", "there is no file HERE/none.py"),
    "no such module": ("train --feedback 'function no_such_module:f'", "there is no module no_such_module; for a file write "),
    "file of no Python": ("train --feedback 'function HERE/syntax.py:f'", "cannot import HERE/syntax.py: SyntaxError"),
    "file that imports what is not there": ("train --feedback 'function HERE/imports.py:f'", "imports.py: ModuleNotFoundError:"
                                            " No module named 'nothing_there' (HERE/imports.py:1)"),
    "other parameters": ("train --feedback 'function HERE/rewards.py:two_answers'", "with the parameters (first, second) fits "
                         "no shape: it takes an answer"),
    "judge without a model": ("train --feedback judge", "JudgeReward misses model"),
    "no such judge": ("train --feedback 'judge HERE/none/x'", "no model at HERE/none/x"),
    "judge of NaN": ("train --feedback 'judge HERE/nan'", "HERE/nan/model.safetensors: the tensor model.layers.0.self_attn"),
    "judge of length -3": ("train --feedback 'judge HERE/lm max_length=-3'", "max_length must be >= 0, not -3"),
    "judge by two criteria": ("train --feedback 'judge HERE/lm principle=x constitution=HERE/broken.toml'", "a judge has a "
                              "principle or a constitution, not both"),
    "template of another form": ("train --feedback 'judge HERE/lm template=HERE/template.txt'", "HERE/template.txt: this is a "
                                 "template for a ranking; form=rating was asked for"),
    "no reward model": ("train --feedback 'model HERE/lm'", "HERE/lm/config.json: a reward model is a ...ForSequenceClassif"),
    "reward model of infinity": ("train --feedback 'model HERE/infinite'", "infinite/model.safetensors: the tensor"),
    "reward model's length": ("train --feedback 'model HERE/rm max_length=9999'", "max_length is 9999; the reward model reads "
                              "1 to 512 tokens"),
    "reward model's batch": ("train --feedback 'model HERE/rm batch_size=0'", "batch_size must be >= 1, not 0"),
    "no such rules": ("train --feedback 'rules HERE/none.toml'", "cannot read HERE/none.toml: No such file"),
    "rules are no TOML": ("train --feedback 'rules HERE/broken.toml'", "HERE/broken.toml:1: no valid TOML at column 8"),
    "rules without formula": ("train --feedback 'rules HERE/no_formula.toml'", "no_formula.toml:1: no [[formula]] makes a "),
    "no expression": ("train --feedback \"regex '('\"", "regex.pattern '(' is no regular expression: missing )"),
    "no schema": ("train --feedback 'json-schema HERE/schema.json'", "HERE/schema.json: no JSON schema: $.type: 3"),
    "code without permission": ("train --feedback unit-tests", "set unit_tests.allow_code_execution to true"),
    "ranks of one answer": ("train --second 'people kind=rank'", "people can only rate (kind=rate)"),
    "too many to rank": ("train --feedback 'people kind=rank' --ppo.answers-per-prompt 10", "people rank at most 9 answers"),
    "crowd": ("train --feedback 'simulated a:b overlap=9'", "overlap (9) must lie in 1 .. raters (5)"),
    "no server": ("train --feedback api", "server is missing: the API's address, such as http://127.0.0.1:8000/v1"),
    "no address": ("train --feedback 'api 127.0.0.1:8000 model=m'", "--feedback 'api 127.0.0.1:8000 model=m': server is "
                   "'127.0.0.1:8000'; an address begins with http:// or https://"),
    "no port": ("train --feedback 'api http://127.0.0.1:80000/v1 model=m'", "server is 'http://127.0.0.1:80000/v1'; an address"
                " names a host, and behind a colon a port from 1 to 65535 or none"),
    "negative price": ("train --feedback 'api http://a/v1 model=m usd_per_million_prompt=-1'", "must not be negative, but is"),
    "no key": ("train --feedback 'api http://127.0.0.1:9/v1 model=m key_env=NO_SUCH_KEY'", "key_env: the environment variable "
               "NO_SUCH_KEY is not set"),
    "budget without prices": ("train --feedback 'api http://127.0.0.1:9/v1 model=m budget_usd=1'", "budget_usd needs the "
                              "prices: usd_per_million_prompt"),
    # Training
    "no such named settings": ("train --config dapo2", "dapo2: cannot be read as JSON ([Errno 2] No such file or directory: 'd"
                               "apo2'); named settings are reinforce, rloo, remax"),
    "rank 0": ("train --lora --adapter.rank 0", "lora.rank must be >= 1, not 0"),
    "an adapter that does not learn": ("train --adapter.rank 4", "adapter, which does not learn: add --lora"),
    "sft: an adapter that does not learn": ("sft --out OUT --adapter.rslora", "which does not learn: add --lora"),
    "greedy": ("train --sampling.temperature 0", "sampling.temperature is 0 (greedy): a policy learns only from samples"),
    "one answer": ("train --ppo.answers-per-prompt 1", "ppo.answers_per_prompt is 1, but ppo.advantage=GroupNormalised"),
    "a file of settings": ("train --config HERE/steps.json", "HERE/steps.json: train.steps must be >= 1, not -5"),
    "devices": ("train --train.prompts-per-step 3", "train.prompts_per_step (3) / train.rollout_parts (1) must be a multiple "
                "of the 8 devices"),
    "weights in two places": ("train --ppo.shaping.weights 1 2", "ppo.shaping.weights are given with the rewards here"),
    "out is a file": ("train --out HERE/prompts.txt", "HERE/prompts.txt is a file; a run needs a folder"),
    "out is no run's folder": ("train --out HERE/lm", "HERE/lm is no run's folder and holds config.json, model.safetensors, "
                               "tokenizer.json ...: choose another --out"),
    "out is below a file": ("train --out HERE/prompts.txt/run", "HERE/prompts.txt is a file; a run needs a folder"),
    "stages are below a file": ("sft --out OUT --data HERE/prompts.txt --max-length 16 --stages HERE/prompts.txt/x "
                                "--fit.batch-size 8", "HERE/prompts.txt is a file; stages need a folder"),
    "NaN": ("train --ppo.shaping.missing-eos-value nan", "ppo.shaping.missing_eos_value should be a number, not NaN"),
    "NaN in a reward": ("train --feedback 'judge HERE/lm min_mass=nan'", "min_mass: should be a number, not 'nan'"),
    "rank over all": ("train --lora --adapter.rank 99", "lora.rank is 99, more than the 48 rows or columns of the largest"),
    "nothing to resume": ("train --resume", "OUT: there is no run to resume here (no config.json)"),
    # Other tools
    "sft without data": ("sft --out OUT", "no texts to learn from: give --data"),
    "sft on nothing": ("sft --out OUT --data HERE/empty.jsonl", "empty.jsonl is empty: expected one JSON object a line"),
    "sft on other rows": ("sft --out OUT --data HERE/unnamed.jsonl", 'unnamed.jsonl:1: a row has messages, prompt and complet'),
    "sft on one list": ("sft --out OUT --data HERE/list.json", "list.json:1: expected a JSON object, not [{\"text\": \"a\"}]; w"
                        "rite the items of a list one a line"),
    "sft on a value over lines": ("sft --out OUT --data HERE/lines.json", "lines.json:1: no valid JSON (Expecting property na"
                                  "me enclosed in double quotes: line 2 column 1 (char 2)); a line holds a whole JSON value"),
    "reward model on nothing": ("reward-model --out OUT --feedback HERE/none.jsonl", "none.jsonl: there is no such file"),
    "generate with NaN": ("generate --model HERE/nan --prompt a", "holds NaN or infinite numbers"),
    "export of a model": ("export HERE/lm --out OUT", "HERE/lm is not the folder of a run"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BEFORE)
def test_what_cannot_work_is_one_line_and_leaves_no_folder(bad, inputs, tmp_path, capsys):
    line, message = BEFORE[bad]
    name, _, line = line.partition(" ")
    before = sorted(inputs.iterdir())
    is_one_line(
        *ended(name, arguments(name, line, inputs, tmp_path / "run"), capsys), message, inputs, tmp_path / "run"
    )
    assert not (tmp_path / "run").exists() and sorted(inputs.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--train.steps x", "Error parsing --train.steps"),
        ("--stepz 3", "Unrecognized options: --stepz"),
        ("--dtype float16", "Expected one of ('float32'"),
        ("--adapter.targets q x", "invalid choice 'x' for argument '--adapter.targets'"),
    ],
)
def test_a_mistyped_option_is_named_in_a_box(line, named, inputs, tmp_path, capsys):
    status, said = ended("train", arguments("train", line, inputs, tmp_path / "run"), capsys)
    assert status == 2 and named in " ".join(" ".join(said).split()) and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--policy HERE/cut.gguf", "HERE/cut.gguf: not a whole GGUF file"),
        ("--policy HERE/endless", "endless/tokenizer_config.json: the chat template does not take a conversation of user: it "
         "computed for seconds without an end"),
    ],
)  # fmt: skip
def test_a_process_ends_with_one_line_as_well(line, message, inputs, tmp_path):
    command = [sys.executable, "-m", "rlaif_jax", "train", *arguments("train", line, inputs, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if " loading" not in line]
    is_one_line(done.returncode, said, message, inputs, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- Judgements that are missing

NOTHING = "; nothing could be learned"
AFTER = {
    "raises": ("function HERE/rewards.py:raises", "the reward function raises failed for each of 8 answers: ValueError: no "
               "such thing (HERE/rewards.py:9)"),
    "NaN": ("function HERE/rewards.py:not_a_number", "the reward function judged none of 8 answers (function: not_a_number "
            f"returned NaN){NOTHING}"),
    "a string": ("function HERE/rewards.py:text", f"(function: text returned a str, not a number){NOTHING}"),
    "no field": ("number", f"the reward number judged none of 8 answers (number: the record has no 'answer'){NOTHING}"),
    "no field to compare with": ("judge HERE/lm form=ranking against=x", "(judge: the record has no text in its field 'x' to "
                                 f"compare with){NOTHING}"),
    "questions too long": ("judge HERE/lm max_length=3", f"(judge: the question is too long for the judge){NOTHING}"),
    "no labels": ("judge HERE/lm", "(judge: the judge gave its labels less probability together than min_mass = 0.5)"),
    "quality 7": ("simulated HERE/rewards.py:seven", "rewards.py:seven: the quality of an answer lies in 0 .. 1, not 7"),
    "no quality": ("simulated HERE/rewards.py:text", f"(simulated: no judgement of the answer has a value){NOTHING}"),
    "server down": ("api http://127.0.0.1:9/v1 model=m attempts=1", "(api: the judge's call failed: no connection to "
                    f"http://127.0.0.1:9/v1: ConnectError All connection attempts failed){NOTHING}"),
    "wrong key": ("api URL model=m key_env=JUDGE_KEY", "(api: the judge's call failed: status 401: wrong with Bearer [key])"
                  f"{NOTHING}"),
    "no money": ("api URL model=m budget_tokens=0", "(api: the judge's call failed: the budget of 0 tokens is spent)"),
}  # fmt: skip


@pytest.mark.parametrize("bad", AFTER)
def test_a_reward_that_judges_nothing_ends_the_run_and_says_why(bad, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    reward, message = AFTER[bad]
    out = tmp_path / "run"
    with serve(lambda body, number: Wrong(401)) as server:
        given = arguments("train", f"--feedback {shlex.quote(reward.replace('URL', server.url))}", inputs, out)
        status, said = ended("train", given, capsys)
        assert len(server.requests) == (bad == "wrong key"), "a wrong key is tried once"
    is_one_line(status, said, message, inputs, out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "failed" and f"error: {summary['error']}" == said[0]
    assert (out / "report.html").exists()
    assert not any("very-secret" in path.read_text(errors="ignore") for path in out.rglob("*") if path.is_file())


def test_a_second_judge_that_judges_nothing_ends_the_run_and_says_why(inputs, tmp_path, capsys):
    line = "--feedback 'function HERE/rewards.py:count_a' --second 'judge HERE/lm min_mass=0.9999'"
    said = ended("train", arguments("train", line, inputs, tmp_path / "run"), capsys)
    message = (
        "--second judged 0 of 8 held-out answers before training (the judge gave its labels less probability together"
    )
    is_one_line(*said, message, inputs, tmp_path / "run")


MISSING = {
    "raises: fussy raised ValueError: no b, please": "of a function that raises",
    "raises: fussy returned NaN": "of a function that returns NaN",
    "raises: fussy returned a str, not a number": "of a function that returns a string",
    "slow: the search of the regular expression took more than 0.05 s": "of a search without end",
}


@pytest.fixture(scope="module")
def partly(inputs, tmp_path_factory):
    """A run with rewards that miss some answers, and answers with code that hangs or eats memory."""
    out = tmp_path_factory.mktemp("partly") / "run"
    rewards = (
        "function HERE/rewards.py:fussy name=raises",
        "regex field=slow timeout_s=0.05 name=slow",
        "unit-tests allow_code_execution=true timeout_s=1 memory_mb=64 name=code",
    )
    line = f"--policy HERE/code --prompts HERE/coded.jsonl --template plain --feedback {shlex.join(rewards)}"
    tool(["train", *arguments("train", line, inputs, out)])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("reason", MISSING)
def test_a_judgement_that_cannot_be_had_is_missing_and_counted(reason, partly):
    summary = json.loads((partly / "summary.json").read_text())
    assert summary["status"] == "done" and all(summary["checks"].values())
    assert summary["missing"][reason] > 0, MISSING[reason]
    assert reason.partition(": ")[2] in (partly / "report.html").read_text()


@pytest.mark.slow
def test_code_that_hangs_or_eats_memory_has_failed_its_tests(partly):
    samples = [json.loads(line) for line in (partly / "samples.jsonl").read_text().splitlines()]
    for code in (HANG, EAT):
        scores = [s["eval/code"] for s in samples if s["response"].find(code.strip()[:24]) >= 0 and "eval/code" in s]
        assert scores and set(scores) == {0}, code


# ---- Nothing is lost


@pytest.fixture(scope="module")
def broken(inputs, tmp_path_factory):
    """A folder with a model, its rewards and a run on them, whose function fails after the first step."""
    here = tmp_path_factory.mktemp("broken")
    shutil.copytree(inputs / "lm", here / "lm")
    shutil.copy(inputs / "prompts.txt", here)
    (here / "rewards.py").write_text(REWARDS)
    (here / "calls").write_text("4")
    line = "--lora --adapter.rank 2 --train.steps 2 --train.save-every 1 --feedback 'function HERE/rewards.py:breaks'"
    with pytest.raises(SystemExit) as end:
        tool(["train", *arguments("train", line, here, here / "run")])
    assert end.value.code == 2
    return here


def other_weights(folder: Path) -> None:
    model, params, tokenizer = load_with_tokenizer(str(folder / "lm"))
    save_model(folder / "lm", model, jax.tree.map(lambda x: x * 1.01, params), tokenizer)


def copied(broken: Path, to: Path) -> Path:
    """Returns the run of a copy of `broken`, whose settings name the files of the copy."""
    run = shutil.copytree(broken, to) / "run"
    settings = (run / "config.json").read_text()
    (run / "config.json").write_text(settings.replace(str(broken), str(to)))
    return run


KEPT = {
    "the function still fails": (lambda folder: (folder / "calls").write_text("0"), "", "the reward "
                                 "function breaks failed for each of 8 answers: OSError: the disk"),
    "another base": (other_weights, "", "run: this run began with other weights (policy)"),
    "no base": (lambda folder: shutil.rmtree(folder / "lm"), "", "no model at HERE/lm"),
    "another setting": (lambda folder: None, "--train.prompts-per-step 16", "train.prompts_per_step was 8 and is now 16"),
    "damaged settings": (lambda folder: (folder / "run/config.json").write_text("{"), "", "run/config.json: this is no run's "
                         "settings"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bad", KEPT)
def test_a_run_that_cannot_go_on_is_left_as_it_is(bad, broken, tmp_path, capsys):
    edit, line, message = KEPT[bad]
    run = copied(broken, tmp_path / "kept")
    edit(run.parent)
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    is_one_line(*ended("train", [*shlex.split(line), "--resume", "--out", str(run)], capsys), message, run.parent, run)
    reports = {"summary.json", "report.html"}  # they say why it ended
    changes = {"the function still fails": {*reports, "samples.jsonl"}, "another base": reports}.get(bad, set())
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert left.keys() <= kept.keys() and {path.name for path in left if left[path] != kept[path]} <= changes


@pytest.mark.slow
def test_once_the_function_is_mended_the_run_goes_on(broken, tmp_path, capsys):
    run = copied(broken, tmp_path / "kept")
    (run.parent / "calls").write_text("99")
    assert ended("train", ["--resume", "--out", str(run)], capsys)[0] == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 2
