"""Rewards by a user's function: both shapes, what is missing and why, and what is refused."""

import dataclasses
import json
import sys
from fractions import Fraction

import numpy as np
import pytest

from rlaif_jax.config import UserError, from_json, to_json
from rlaif_jax.data.chat.records import chat_records
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.verifiers.functions import PythonFunction

RECORDS = [{"prompt": f"p{i}", "gold": i} for i in range(4)]
ANSWERS = ["a", "bb", "ccc", "dddd"]


@pytest.fixture
def build(tmp_path):
    """Writes a file with a function `reward` and builds its source."""

    def build(code, **settings):
        (tmp_path / "rewards.py").write_text(code)
        return PythonFunction(f"{tmp_path}/rewards.py:reward", **settings).build()

    return build


def judged(source, records=RECORDS, answers=ANSWERS):
    feedback = source(records, answers, None)
    assert feedback.values.dtype == np.float32 and feedback.values.shape == feedback.valid.shape == (len(answers), 1)
    assert not feedback.values[~feedback.valid].any()
    return [float(v) if ok else None for v, ok in zip(feedback.values[:, 0], feedback.valid[:, 0])]


@pytest.mark.parametrize(
    "code, expected",
    [
        ("def reward(answer): return len(answer)", [1, 2, 3, 4]),
        ("def reward(prompt, answer, record): return int(prompt[1]) + 10 * record['gold']", [0, 11, 22, 33]),
        ("def reward(*, answer, scale=2.5): return scale", [2.5] * 4),
        ("def reward(answer, **rest): return sorted(rest) == ['prompt', 'record']", [1, 1, 1, 1]),
        ("class Reward:\n    def __call__(self, answer): return 7\nreward = Reward()", [7] * 4),
        ("import functools\ndef f(answer, k): return k\nreward = functools.partial(f, k=3)", [3] * 4),
        ("def reward(completions): return [len(c) for c in completions]", [1, 2, 3, 4]),
        ("def reward(prompts, completions, gold, **kwargs): return [g * 2 for g in gold]", [0, 2, 4, 6]),
        ("def reward(completions, **kwargs): return [sorted(kwargs) == ['gold', 'prompts']] * 4", [1] * 4),
        ("import numpy as np\ndef reward(completions): return np.arange(4) / 2", [0, 0.5, 1, 1.5]),
        ("async def reward(answer): return len(answer)", [1, 2, 3, 4]),
        ("async def reward(completions, **kwargs): return [len(c) for c in completions]", [1, 2, 3, 4]),
    ],
)
def test_both_shapes(build, code, expected):
    source = build(code)
    assert judged(source) == expected and source.missing() == {} and source.first_error == ""


def test_a_list_of_messages_is_answered_by_messages(build):
    code = (
        "def reward(prompts, completions): return [c == [{'role': 'assistant', 'content': 'a'}] for c in completions]"
    )
    chat = [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "hi"}]
    assert judged(build(code), chat, ["a", "a"]) == [1, 0]
    assert judged(build(code, messages=True), chat, ["a", "a"]) == [1, 1]
    code = "def reward(prompts, completions): return [p == [{'role': 'user', 'content': 'hi'}] for p in prompts]"
    assert judged(build(code), chat, ["a", "a"]) == [1, 0]
    assert judged(build(code, messages=True), chat, ["a", "a"]) == [1, 1]


def test_a_prompt_that_came_as_messages_reaches_trls_shape_as_messages(build):
    source = build(
        "SAID = []\ndef reward(prompts, completions, **kwargs):\n"
        "    SAID.extend((p, c, sorted(kwargs)) for p, c in zip(prompts, completions))\n    return [1] * len(prompts)"
    )
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    records = chat_records(
        [{"prompt": turns}, {"messages": turns}, {"prompt": "hi", "gold": 1}],
        word_level_tokenizer(("hi",)),
        template=False,
    )
    for messages, asked in ((False, [turns, turns, "hi"]), (True, [turns, turns, turns[1:]])):
        source = dataclasses.replace(source, messages=messages)
        assert judged(source, records.records, ["a"] * 3) == [1, 1, 1]
        said = source.function.__globals__["SAID"]
        assert [prompt for prompt, _, _ in said] == asked
        assert [completion for _, completion, _ in said] == [
            [{"role": "assistant", "content": "a"}] if isinstance(prompt, list) else "a" for prompt in asked
        ]
        assert said[0][2] == ["gold", "messages"]
        said.clear()


@pytest.mark.parametrize(
    "returned, value, reason",
    [
        ("None", None, "reward returned None"),
        ("float('nan')", None, "reward returned NaN"),
        ("-float('inf')", None, "reward returned an infinite number"),
        ("1e39", None, "reward returned an infinite number"),  # beyond float32
        ("10 ** 400", None, "reward returned an infinite number"),
        ("'0.5'", None, "reward returned a str, not a number"),
        ("[1.0]", None, "reward returned a list, not a number"),
        ("1j", None, "reward returned a complex, not a number"),
        ("__import__('numpy').ones(1)", None, "reward returned a ndarray, not a number"),
        ("asyncio.sleep(0)", None, "reward returned a coroutine, not a number"),
        ("True", 1.0, None),
        ("False", 0.0, None),
        ("0", 0.0, None),
        ("__import__('numpy').bool_(True)", 1.0, None),
        ("__import__('numpy').float32(0.25)", 0.25, None),
        ("__import__('numpy').array(0.25)", 0.25, None),
        ("__import__('fractions').Fraction(1, 4)", 0.25, None),
    ],
)
def test_what_is_a_reward(build, returned, value, reason):
    source = build(f"import asyncio\ndef reward(answer): return {returned} if answer == 'a' else 2")
    assert judged(source) == [value, 2, 2, 2] and source.missing() == ({reason: 1} if reason else {})
    if "asyncio" not in returned:  # a coroutine among the items of a list is nobody's
        source = build(f"def reward(completions): return [{returned}, 2, 2, 2]")
        assert judged(source) == [value, 2, 2, 2] and source.missing() == ({reason: 1} if reason else {})


@pytest.mark.parametrize(
    "returned, reason",
    [
        ("[1.0] * 3", "reward returned a list of another length than the answers"),
        ("1.0", "reward returned a float, not a list"),
        ("None", "reward returned a NoneType, not a list"),
        ("'abcd'", "reward returned a str, not a list"),
        ("{0: 1}", "reward returned a dict, not a list"),
    ],
)
def test_lists_that_fit_no_answers(build, returned, reason):
    source = build(f"def reward(completions): return {returned}")
    assert judged(source) == [None] * 4 and source.missing() == {reason: 4}


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_an_exception_is_a_missing_judgement_and_the_first_is_kept(build, keyword):
    source = build(
        f"{keyword} reward(answer):\n"
        "    if len(answer) == 2: raise ValueError('no unit\\nsecond line')\n"
        "    if len(answer) == 3: raise KeyError\n"
        "    if len(answer) == 4: raise SystemExit(3)\n"
        "    return 1"
    )
    for _ in range(2):
        assert judged(source) == [1, None, None, None]
    counts = {"reward raised ValueError: no unit": 2, "reward raised KeyError": 2, "reward raised SystemExit: 3": 2}
    assert source.missing() == counts
    assert "rewards.py" in source.first_error and "ValueError: no unit\nsecond line" in source.first_error
    assert source.first_error.count("Traceback") == 1
    state = json.loads(json.dumps(source.get_state()))
    source.set_state(state)
    assert source.missing() == counts


def test_what_is_no_exception_or_has_no_text_is_a_missing_judgement_and_a_stop_is_one(build):
    source = build(
        "class Silent(Exception):\n"
        "    def __str__(self): raise ValueError\n"
        "class Odd(BaseException): pass\n"
        "def reward(answer):\n"
        "    if len(answer) > 1: raise (Silent, Odd, KeyboardInterrupt)[len(answer) - 2]()\n"
        "    return 1"
    )
    assert judged(source, [{}] * 3, ["a", "ab", "abc"]) == [1, None, None]
    assert source.missing() == {"reward raised Silent": 1, "reward raised Odd": 1}
    with pytest.raises(KeyboardInterrupt):
        judged(source, [{}], ["abcd"])


def test_a_file_that_ends_the_program_is_named(tmp_path):
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match=r"cannot import .*ends\.py: SystemExit: 0 \(.*ends\.py:2\)"):
        PythonFunction(f"{tmp_path / 'ends.py'}:f").build()


def test_a_field_with_the_name_answer_is_a_list_next_to_completions(build):
    source = build("def reward(completions=None, answer=None): return [c == a for c, a in zip(completions, answer)]")
    assert judged(source, [{"answer": "x"}, {"answer": "x"}], ["x", "y"]) == [1, 0]


def test_a_long_message_is_cut(build):
    source = build("def reward(answer):\n    if answer == 'a': raise ValueError('x' * 1000)\n    return 1")
    judged(source)
    assert source.missing() == {f"reward raised ValueError: {'x' * 120}...": 1}


@pytest.mark.parametrize(
    "code",
    [
        "import json\ndef reward(answer):\n    return json.loads('{')",
        "import json\nasync def reward(answer):\n    return json.loads('{')",
        "import json\ndef reward(completions):\n    return json.loads('{')",
        "import json\nasync def reward(completions):\n    return json.loads('{')",
    ],
)
def test_a_function_that_always_fails_stops_the_run(build, code):
    line = r"the reward function reward failed for each of 4 answers: JSONDecodeError: Expecting .*rewards.py:3\)$"
    with pytest.raises(UserError, match=line):
        build(code)(RECORDS, ANSWERS, None)
    assert build(code)([], [], None).values.shape == (0, 1)


def test_a_field_that_no_record_has(build):
    source = build("def reward(completions, solution, gold): return [1.0] * 4")
    with pytest.raises(
        UserError, match="the reward function reward needs solution; no record has a field of that name"
    ):
        source(RECORDS, ANSWERS, None)
    assert judged(source, [*RECORDS[:3], {"prompt": "p", "solution": 1}]) == [1.0] * 4


def test_asynchronous_answers_are_judged_at_a_time_up_to_the_limit(build):
    code = (
        "import asyncio\nrunning = most = 0\n"
        "async def reward(answer):\n"
        "    global running, most\n"
        "    running += 1\n"
        "    most = max(most, running)\n"
        "    await asyncio.sleep(0.01)\n"
        "    running -= 1\n"
        "    return float(answer)"
    )
    source = build(code, concurrency=3)
    answers = [str(i) for i in range(10)]
    assert judged(source, [{}] * 10, answers) == list(map(float, answers))
    assert source.function.__globals__["most"] == 3


def test_asynchronous_functions_in_a_notebook(build):
    """A notebook's thread runs a loop of events already."""
    import asyncio

    source = build("async def reward(answer): return len(answer)")

    async def cell():
        return judged(source)

    assert asyncio.run(cell()) == [1, 2, 3, 4]


def test_a_module_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "their_rewards.py").write_text(
        "class Kind:\n    @staticmethod\n    def short(answer): return -len(answer)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = from_json(PythonFunction, to_json(PythonFunction("their_rewards:Kind.short")))
    assert judged(config.build()) == [-1, -2, -3, -4]
    del sys.modules["their_rewards"]


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rewards.py").write_text(
            "from __future__ import annotations\nimport dataclasses, sys\n"
            f"@dataclasses.dataclass\nclass Weight:\n    value: float = {value}\n"
            "def reward(answer): return sys.modules[__name__].Weight().value"
        )
    sources = [PythonFunction(f"{tmp_path}/{name}/rewards.py:reward").build() for name in ("one", "two")]
    assert [judged(source)[0] for source in sources] == [1, 2]


@pytest.mark.parametrize("target", ["reward", "rewards.py", ":reward", "module:", " : "])
def test_targets_that_are_none(target):
    with pytest.raises(UserError, match=r"it is MODULE:FUNCTION or path/file.py:FUNCTION"):
        PythonFunction(target)


@pytest.mark.parametrize(
    "code, words",
    [
        ("x = 1", r"has no 'reward'; it has no functions"),
        ("def other(answer): pass", r"has no 'reward'; it has the functions other"),
        ("reward = 3", "reward is 3, not a function"),
        ("class reward: pass", "reward is <class .*, not a function"),
        ("def reward(x): pass", r"with the parameters \(x\) fits no shape: it takes an answer .* or completions"),
        ("def reward(): pass", r"with the parameters \(\) fits no shape"),
        ("def reward(**kwargs): pass", r"with the parameters \(\*\*kwargs\) fits no shape"),
        ("def reward(answer, reference): pass", r"with the parameters \(answer, reference\) fits no shape"),
        ("def reward(answer, /): pass", r"with the parameters \(answer, /\) fits no shape"),
        ("reward = type", "not a function"),
        ("reward = max", "Python does not know the parameters"),
        ("import no_such_module", r"cannot import .*rewards.py: ModuleNotFoundError: .*rewards.py:1\)$"),
        ("\nx = 1 / 0", r"cannot import .*rewards.py: ZeroDivisionError: division by zero \(.*rewards.py:2\)$"),
        ("def reward(:", r"cannot import .*rewards.py: SyntaxError: .*rewards.py:1\)$"),
    ],
)
def test_functions_that_cannot_be_built(build, code, words):
    with pytest.raises(UserError, match=words) as raised:
        build(code)
    assert "\n" not in str(raised.value)


def test_other_settings_that_are_not_right(build, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no file .*nowhere.py"):
        PythonFunction(f"{tmp_path}/nowhere.py:reward").build()
    with pytest.raises(UserError, match=r"there is no module no_such_module; for a file write path/file.py:FUNCTION"):
        PythonFunction("no_such_module:reward").build()
    (tmp_path / "broken_rewards.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot import broken_rewards: ModuleNotFoundError: .*broken_rewards.py:1\)"):
        PythonFunction("broken_rewards:reward").build()
    with pytest.raises(UserError, match=r"function.concurrency must be at least 1, not 0"):
        PythonFunction("module:reward", concurrency=0)
    with pytest.raises(UserError, match=r"function.messages is for functions of completions"):
        build("def reward(answer): pass", messages=True)


def test_fractions_keep_their_value(build):
    """The oracle of a reward's value is exact arithmetic."""
    source = build("from fractions import Fraction\ndef reward(answer, record): return Fraction(record['gold'], 3)")
    assert judged(source) == [float(np.float32(float(Fraction(i, 3)))) for i in range(4)]
