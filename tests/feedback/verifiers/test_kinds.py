"""All kinds of users' rewards: as settings in JSON and on a command line, and side by side as columns."""

import dataclasses
import json
import typing

import pytest

from rlaif_jax.config import UserError, from_json, override, to_json
from rlaif_jax.feedback.joined import JoinedSource
from rlaif_jax.feedback.verifiers.constraints import Constraints
from rlaif_jax.feedback.verifiers.functions import PythonFunction
from rlaif_jax.feedback.verifiers.kinds import UserReward
from rlaif_jax.feedback.verifiers.number import Number
from rlaif_jax.feedback.verifiers.texts import ExactMatch


@dataclasses.dataclass(frozen=True)
class Settings:
    rewards: tuple[UserReward, ...] = ()
    reward: UserReward = ExactMatch()


def test_kinds_as_json_and_from_a_command_line():
    config = Settings((Number(where="boxed"), Constraints(all_or_nothing=True), PythonFunction("a:b")))
    values = json.loads(json.dumps(to_json(config)))
    assert [value["type"] for value in values["rewards"]] == ["Number", "Constraints", "PythonFunction"]
    assert from_json(Settings, values) == config
    changed = override(config, {"reward": "Number", "reward.where": "hashes"})
    assert changed.reward == Number(where="hashes")
    names = ", ".join(kind.__name__ for kind in typing.get_args(UserReward))
    with pytest.raises(UserError, match=rf"reward\.type: should be one of {names}, not 'Exact'"):
        from_json(Settings, {"reward": {"type": "Exact"}})


def test_several_rewards_of_a_run(tmp_path):
    (tmp_path / "rewards.py").write_text("def short(answer): return -len(answer) if answer else None")
    kinds = (Number(), Constraints(), PythonFunction(f"{tmp_path}/rewards.py:short"))
    source = JoinedSource(tuple(kind.build() for kind in kinds), ("right", "form", "short"))
    records = [
        {"answer": 3, "constraints": [{"type": "no_commas"}, {"type": "max_words", "count": 1}]},
        {"answer": "x"},
    ]
    feedback = source(records, ["3, 3", ""], None)
    assert feedback.values.tolist() == [[1, 0, -4], [0, 0, 0]]
    assert feedback.valid.tolist() == [[True, True, True], [False, False, False]]
    assert source.missing() == {
        "right: the record's 'answer' is no number": 1,
        "form: the record has no 'constraints'": 1,
        "short: short returned None": 1,
    }
