"""Settings survive JSON, overrides are checked against their types, and wrong ones are named."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.algorithms.advantages import GAE, GroupNormalised, LeaveOneOut
from rlaif_jax.algorithms.objectives import Clipped
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.algorithms.surrogate import AnswerRatio
from rlaif_jax.algorithms.update import check_minibatches
from rlaif_jax.config import (
    UserError,
    differing,
    from_json,
    from_words,
    missing_extra,
    override,
    save_config,
    to_json,
    without_secrets,
)
from rlaif_jax.models.decoder_config import DecoderConfig, RopeScaling, small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig
from rlaif_jax.rewards.shaping import Shaping
from rlaif_jax.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Listed:
    """A setting that JSON has no type for."""

    words: tuple[str, ...] = ("a", "b")
    scale: float = 0.7


@dataclasses.dataclass(frozen=True)
class Mean:
    """One of three choices."""

    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Best:
    """Another, with a choice inside."""

    of: int
    then: Mean | Best | Last | None = None


@dataclasses.dataclass(frozen=True)
class Last:
    """One without settings."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of `Whole`."""

    choice: Mean | Best | Last = Mean()
    rate: float = 0.1
    cap: float | None = None
    also: Mean | None = None


@dataclasses.dataclass(frozen=True)
class Whole:
    """Every type that a setting may have."""

    part: Part = Part()
    parts: tuple[Part, ...] = ()
    pair: tuple[int, str] = (1, "a")
    choices: tuple[Mean | Last, ...] = ()
    named: dict[str, Part] = dataclasses.field(default_factory=dict)
    folder: Path = Path("runs")
    file: Path | None = None
    mode: Literal["plain", "mesh", 3] = "plain"
    on: bool = False
    steps: int = 1
    text: str = ""
    either: int | str | None = None

    def __post_init__(self):
        if self.steps > 100 and not self.on:
            raise UserError("more than 100 steps need on")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The settings that every experiment has."""

    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    ppo: PPOConfig = PPOConfig()


TRAIN = TrainConfig(steps=7, prompts_per_step=6, parallel=ParallelConfig(mode="shard", fsdp=2), target_reward=1.5)
EXPERIMENT = Experiment(
    TRAIN,
    SamplingConfig(max_new_tokens=9, temperature=0.7, top_p=0.95),
    PPOConfig(
        advantage=GroupNormalised(),
        answers_per_prompt=4,
        kl_in="loss",
        kl_target=6.0,
        num_minibatches=3,
        shaping=Shaping(missing_eos="penalty"),
        policy_optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_updates=3),
    ),
)
LLAMA = small_decoder(50, rope_scaling=RopeScaling(kind="llama3", factor=8.0), qkv_bias=True)


@pytest.mark.parametrize(
    "config",
    [EXPERIMENT, Experiment(), TRAIN, TrainConfig(), LLAMA, small_decoder(50), OptimizerConfig(), Listed()],
    ids=lambda c: type(c).__name__,
)
def test_round_trip_through_json(config, tmp_path):
    path = tmp_path / "config.json"
    save_config(config, path)
    values = json.loads(path.read_text())
    assert values == to_json(config)
    again = from_json(type(config), values)
    assert again == config
    assert to_json(again) == values


def test_to_json_is_complete():
    values = to_json(EXPERIMENT)
    assert set(values["train"]) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert values["ppo"]["advantage"] == {"type": "GroupNormalised"}
    assert values["ppo"]["policy_optimizer"]["schedule"] == "cosine"
    assert values["ppo"]["value_optimizer"] == to_json(OptimizerConfig())


def test_fields_left_out_have_their_default():
    assert from_json(Experiment, {"train": {"steps": 3}, "ppo": {"kl_coef": 0.2}}) == Experiment(
        TrainConfig(steps=3), ppo=PPOConfig(kl_coef=0.2)
    )


def test_unknown_fields_are_named_with_their_place():
    with pytest.raises(
        UserError, match=r"run.json: stepz: TrainConfig has no such field; it has steps, prompts_per_step"
    ):
        from_json(TrainConfig, {"stepz": 3}, "run.json")
    with pytest.raises(UserError, match=r"config.json: ppo.policy_optimizer.rate: OptimizerConfig has no such field"):
        from_json(Experiment, {"ppo": {"policy_optimizer": {"rate": 1}}})


def test_missing_fields_are_named():
    with pytest.raises(UserError, match="DecoderConfig misses mlp_width, context_length"):
        from_json(
            DecoderConfig,
            {"vocab_size": 5, "num_layers": 1, "width": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4},
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingConfig(max_new_tokens=0), "sampling.max_new_tokens must be >= 1, not 0"),
        (lambda: SamplingConfig(temperature=-0.1), "sampling.temperature must be >= 0"),
        (lambda: SamplingConfig(top_k=-1), "sampling.top_k"),
        (lambda: SamplingConfig(top_p=0.0), r"sampling.top_p must lie in \(0, 1\], not 0.0"),
        (lambda: SamplingConfig(top_p=1.1), "sampling.top_p"),
        (lambda: OptimizerConfig(learning_rate=0), "optimizer.learning_rate"),
        (lambda: OptimizerConfig(max_grad_norm=0), "optimizer.max_grad_norm must be > 0, not 0"),
        (lambda: OptimizerConfig(max_grad_norm=-1.0), "optimizer.max_grad_norm must be > 0"),
        (lambda: OptimizerConfig(eps=float("nan")), "optimizer.eps must be > 0, not nan"),
        (lambda: OptimizerConfig(warmup_updates=-1), "optimizer.warmup_updates must be >= 0, not -1"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "optimizer.weight_decay must be >= 0"),
        (lambda: OptimizerConfig(b2=1.0), r"optimizer.b2 must lie in \[0, 1\), not 1.0"),
        (lambda: PPOConfig(value_clip_range=0), "ppo.value_clip_range must be > 0, not 0"),
        (lambda: PPOConfig(value_clip_range=-0.2), "ppo.value_clip_range must be > 0"),
        (
            lambda: OptimizerConfig(schedule="cosin"),
            "optimizer.schedule is 'cosin'; it is one of linear, constant, cos",
        ),
        (lambda: from_json(PPOConfig, {"advantage": {"type": "GEA"}}), "one of GAE, ReturnToGo, MovingBaseline"),
        (lambda: ParallelConfig(mode="mesh"), "parallel.mode is 'mesh'"),
        (lambda: small_decoder(9, norm="batch"), "DecoderConfig.norm is 'batch'"),
        (lambda: PPOConfig(num_epochs=0), "ppo.num_epochs must be >= 1, not 0"),
        (lambda: PPOConfig(num_minibatches=0), "ppo.num_minibatches"),
        (lambda: GAE(gae_lambda=1.01), "advantage.gae_lambda"),
        (lambda: GAE(gamma=0), "advantage.gamma"),
        (lambda: Clipped(clip_range=0), "objective.clip_range"),
        (lambda: PPOConfig(kl_coef=-0.1), "ppo.kl_coef"),
        (lambda: TrainConfig(steps=0), "train.steps must be >= 1, not 0"),
        (lambda: TrainConfig(prompt_length=0), "train.prompt_length"),
        (lambda: PPOConfig(ratio=AnswerRatio()), "ppo.advantage=GAE has one for each token"),
        (lambda: PPOConfig(advantage=LeaveOneOut(), kl_in="loss"), "set answers_per_prompt to 2 or more"),
        (lambda: check_minibatches(6, 4, 1, 1), "6 sequences .* cannot be cut into 4 minibatches"),
        (
            lambda: small_decoder(9, num_heads=6, num_kv_heads=4),
            r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)",
        ),
        (lambda: small_decoder(9, width=18, num_heads=6), r"head_dim \(3\) must be even"),
    ],
)
def test_invalid_values_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_invalid_values_are_named_from_json_too():
    with pytest.raises(UserError, match=r"sampling\.top_p"):
        from_json(Experiment, {"sampling": {"top_p": 3.0}})


def test_settings_are_frozen_and_a_user_error_is_no_value_error():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TRAIN.steps = 3
    assert not issubclass(UserError, ValueError)


def test_defaults_are_the_papers():
    ppo, optimizer = PPOConfig(), OptimizerConfig()
    assert ppo.advantage == GAE(gamma=1.0, gae_lambda=0.95)
    assert (ppo.objective, ppo.kl_target) == (Clipped(clip_range=0.2), None)
    assert (optimizer.learning_rate, optimizer.eps, optimizer.schedule) == (3e-6, 1e-5, "linear")


# ---- Unions of dataclasses, and every other type


def test_a_choice_is_written_with_the_name_of_its_class():
    values = to_json(Whole(part=Part(choice=Best(3, then=Last()), also=Mean(2.0))))
    assert values["part"]["choice"] == {"type": "Best", "of": 3, "then": {"type": "Last"}}
    assert values["part"]["also"] == {"weight": 2.0}, "where there is only one class, its name says nothing"


def test_a_dict_of_settings_is_plain_json_too():
    assert to_json({"fit": Mean(), "files": [Path("a")], "mix": (Last(), None)}) == {
        "fit": {"weight": 1.0},
        "files": ["a"],
        "mix": [{}, None],
    }


def test_other_objects_have_a_name_or_an_error():
    values = to_json(
        {"f": to_json, "class": Mean, "array": np.arange(3), "number": np.float32(0.5), "many": np.ones(9999)}
    )
    assert values.pop("many") == [1.0] * 9999, "nothing is left out"
    assert values == {"f": "rlaif_jax.config.to_json", "class": f"{__name__}.Mean", "array": [0, 1, 2], "number": 0.5}
    with pytest.raises(TypeError, match="JSON has nothing for the type object"):
        to_json({"a": object()})


FLOATS = st.floats(allow_nan=False)
MEANS = st.builds(Mean, FLOATS)
CHOICES = st.recursive(
    MEANS | st.builds(Last), lambda inner: st.builds(Best, st.integers(), st.none() | inner), max_leaves=4
)
PARTS = st.builds(Part, CHOICES, FLOATS, st.none() | FLOATS, st.none() | MEANS)
FILES = st.text("abc./", min_size=1).map(Path)


@given(
    st.builds(
        Whole,
        part=PARTS,
        parts=st.lists(PARTS, max_size=3).map(tuple),
        pair=st.tuples(st.integers(), st.text()),
        choices=st.lists(MEANS | st.builds(Last), max_size=3).map(tuple),
        named=st.dictionaries(st.text(), PARTS, max_size=2),
        folder=FILES,
        file=st.none() | FILES,
        mode=st.sampled_from(["plain", "mesh", 3]),
        on=st.booleans(),
        steps=st.integers(max_value=100),
        text=st.text(),
        either=st.none() | st.integers() | st.text(),
    )
)
def test_any_config_comes_back_from_json(config):
    values = json.loads(json.dumps(to_json(config)))
    again = from_json(Whole, values)
    assert again == config
    assert to_json(again) == values
    assert differing(values, to_json(config)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"part": {"choice": {"type": "Median"}}},
            r"part\.choice\.type: should be one of Mean, Best, Last, not 'Median'",
        ),
        ({"part": {"choice": {"weight": 1.0}}}, r"part\.choice\.type: should be one of Mean, Best, Last, not None"),
        (
            {"part": {"choice": {"type": ["Mean"]}}},
            r"part\.choice\.type: should be one of Mean, Best, Last, not \['Mean'\]",
        ),
        ({"part": {"choice": {"type": "Best"}}}, r"part\.choice: Best misses of"),
        (
            {"part": {"choice": {"type": "Best", "of": 1, "on": 1}}},
            r"part\.choice\.on: Best has no such field; it has of",
        ),
        ({"parts": [{}, {"rate": "high"}]}, r"parts\.1\.rate: should be a number, not 'high'"),
        ({"part": 3}, r"part: should be the settings of Part, not 3"),
        ({"pair": [1]}, r"pair: should be tuple\[int, str\], not \[1\]"),
        ({"named": {"a": {"cap": []}}}, r"named\.a\.cap: should be a number or none, not \[\]"),
        ({"mode": "fast"}, r"mode: should be one of plain, mesh, 3, not 'fast'"),
        ({"on": 1}, r"on: should be true or false, not 1"),
        ({"steps": True}, r"steps: should be a whole number, not True"),
        ({"steps": "3"}, r"steps: should be a whole number, not '3'"),
        ({"folder": 3}, r"folder: should be a path, not 3"),
        ({"either": 0.5}, r"either: should be a whole number or a text or none, not 0.5"),
    ],
)
def test_json_of_another_type_is_named(values, message):
    with pytest.raises(UserError, match="config.json: " + message):
        from_json(Whole, values)


# ---- Overrides


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"steps": 5, "part.rate": 0.5}, Whole(steps=5, part=Part(rate=0.5))),
        ({"steps": "5", "part.rate": "1e-3", "part.cap": "none"}, Whole(steps=5, part=Part(rate=1e-3))),
        ({"part.choice": "Last"}, Whole(part=Part(choice=Last()))),
        ({"part.choice": Best(2)}, Whole(part=Part(choice=Best(2)))),
        ({"part.choice": {"type": "Best", "of": "2"}}, Whole(part=Part(choice=Best(2)))),
        ({"part.choice.weight": 3}, Whole(part=Part(choice=Mean(3.0)))),
        ({"part.choice.weight": 3, "part.choice": "Mean"}, Whole(part=Part(choice=Mean(3.0)))),
        ({"part": Part(rate=2.0), "part.cap": 1}, Whole(part=Part(rate=2.0, cap=1.0))),
        ({"pair": "3 b", "mode": "3", "on": "True"}, Whole(pair=(3, "b"), mode=3, on=True)),
        ({"choices": "Mean, Last", "file": "a/b"}, Whole(choices=(Mean(), Last()), file=Path("a/b"))),
        ({"either": "7", "text": "7", "folder": Path("x")}, Whole(either=7, text="7", folder=Path("x"))),
        ({"steps": 500, "on": True}, Whole(steps=500, on=True)),
    ],
)
def test_overrides(values, expected):
    config = Whole()
    assert override(config, values) == expected
    assert config == Whole()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"part.rat": 1}, r"^part\.rat: Part has no such field; it has choice, rate, cap, also$"),
        ({"part.rate": "much"}, r"^part\.rate: should be a number, not 'much'$"),
        ({"steps": 0.5}, r"^steps: should be a whole number, not 0\.5$"),
        ({"part.choice": "Median"}, r"^part\.choice: should be Mean or Best or Last, not 'Median'$"),
        ({"part.choice": "Best"}, r"^part\.choice: Best misses of$"),
        ({"part.choice.of": 3}, r"^part\.choice\.of: Mean has no such field; it has weight$"),
        ({"part.also.weight": 1}, r"^part\.also: this is None and has no field weight; it is Mean or none$"),
        ({"steps.x": 1}, r"^steps: this is 1 and has no field x; it is a whole number$"),
        ({"steps": 500}, "more than 100 steps need on"),
    ],
)
def test_wrong_overrides_are_named(values, message):
    with pytest.raises(UserError, match=message):
        override(Whole(), values)


def test_overrides_of_the_loop():
    values = {"ppo.kl_coef": "0.5", "ppo.policy_optimizer.schedule": "constant", "train.target_reward": "none"}
    config = override(EXPERIMENT, values)
    assert config.ppo.kl_coef == 0.5
    assert config.ppo.policy_optimizer == dataclasses.replace(EXPERIMENT.ppo.policy_optimizer, schedule="constant")
    assert config.train.target_reward is None
    with pytest.raises(UserError, match=r"importance\.most must be >= 1, not 0\.5"):
        override(EXPERIMENT, {"ppo.importance.most": "0.5"})


WORDS = {"mean": Mean, "best": Best, "last": Last, "listed": Listed}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mean", Mean()),
        ("mean .5", Mean(0.5)),
        ("mean weight=2", Mean(2.0)),
        ("best 3 then=Last", Best(3, Last())),
        ("listed words=x,y scale=1", Listed(("x", "y"), 1.0)),
        ("listed 'x y'", Listed(("x", "y"))),
    ],
)
def test_a_line_of_words_is_settings(line, expected):
    assert from_words(WORDS, line, "--feedback") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("median", "there is no 'median'; it is one of mean, best, last, listed"),
        ("", "names nothing; begin with one of mean, best, last, listed"),
        ("mean 'half", "No closing quotation"),
        ("mean .5 .6", "'.6' is no setting of mean; it has weight"),
        ("mean size=3", "'size=3' is no setting of mean; it has weight"),
        ("mean weight=1 weight=2", "weight is given twice"),
        ("mean .5 weight=2", "weight is given twice"),
        ("mean weight=much", "weight: should be a number, not 'much'"),
        ("best", "Best misses of"),
        ("last 3", "'3' is no setting of last"),
    ],
)
def test_a_wrong_line_of_words_is_named(line, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        from_words(WORDS, line, "--feedback")
    assert str(error.value).startswith("--feedback") and "\n" not in str(error.value)


def test_secrets_and_credentials_are_hidden_and_numbers_are_not():
    settings = {
        "api_key": "sk", "tokenizer": "t.json", "max_tokens": 8, "hub_token": None, "secrets": ["a"], "password": {},
        "parts": [{"server": "https://me:pw@host/v1", "Key": "k"}, ["http://u@h", 0.5]],
    }  # fmt: skip
    assert without_secrets(settings) == {
        "api_key": "(hidden)", "tokenizer": "t.json", "max_tokens": 8, "hub_token": None, "secrets": "(hidden)",
        "password": "(hidden)",
        "parts": [{"server": "https://(hidden)@host/v1", "Key": "(hidden)"}, ["http://(hidden)@h", 0.5]],
    }  # fmt: skip


def test_a_missing_package_names_an_extra_that_exists_and_how_it_is_installed_from_a_clone():
    root = Path(__file__).parents[1]
    message = str(missing_extra("a page needs the package fastapi", "ui"))
    assert message.startswith("a page needs the package fastapi: pip install -e '.[ui]' in the project's folder, or ")
    assert "\n" not in message
    known = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = "".join(path.read_text() for path in (root / "rlaif_jax").rglob("*.py"))
    assert set(re.findall(r'missing_extra\(\s*f?".*", "(\w+)"\s*\)', sources)) == set(known)
    assert "rlaif-jax[" not in sources, "the package is on no index"
