"""Settings survive JSON, and wrong ones are named."""

import dataclasses
import json

import pytest

from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.config import UserError, from_json, save_config, to_json
from rlaif_jax.models.decoder_config import DecoderConfig, RopeScaling, small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig
from rlaif_jax.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Listed:
    """A setting that JSON has no type for."""

    words: tuple[str, ...] = ("a", "b")
    scale: float = 0.7


TRAIN = TrainConfig(
    steps=7,
    answers_per_prompt=4,
    prompts_per_step=6,
    sampling=SamplingConfig(max_new_tokens=9, temperature=0.7, top_p=0.95),
    ppo=PPOConfig(
        advantage="group",
        kl_in="loss",
        kl_target=6.0,
        num_minibatches=3,
        missing_eos="penalty",
        policy_optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_updates=3),
    ),
    parallel=ParallelConfig(mode="shard", fsdp=2),
    target_reward=1.5,
)
LLAMA = small_decoder(50, rope_scaling=RopeScaling(kind="llama3", factor=8.0), qkv_bias=True)


@pytest.mark.parametrize(
    "config",
    [TRAIN, TrainConfig(), LLAMA, small_decoder(50), OptimizerConfig(), Listed()],
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
    values = to_json(TRAIN)
    assert set(values) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert values["ppo"]["policy_optimizer"]["schedule"] == "cosine"
    assert values["ppo"]["value_optimizer"] == to_json(OptimizerConfig())


def test_fields_left_out_have_their_default():
    assert from_json(TrainConfig, {"steps": 3, "ppo": {"kl_coef": 0.2}}) == TrainConfig(
        steps=3, ppo=PPOConfig(kl_coef=0.2)
    )


def test_unknown_fields_are_named_with_their_place():
    with pytest.raises(UserError, match=r"run.json: TrainConfig has no field stepz; it has steps, prompts_per_step"):
        from_json(TrainConfig, {"stepz": 3}, "run.json")
    with pytest.raises(UserError, match=r"config.json: ppo: policy_optimizer: OptimizerConfig has no field rate"):
        from_json(TrainConfig, {"ppo": {"policy_optimizer": {"rate": 1}}})


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
        (
            lambda: OptimizerConfig(schedule="cosin"),
            "optimizer.schedule is 'cosin'; it is one of linear, constant, cos",
        ),
        (lambda: PPOConfig(advantage="gea"), "ppo.advantage is 'gea'; it is one of gae, group"),
        (lambda: ParallelConfig(mode="mesh"), "parallel.mode is 'mesh'"),
        (lambda: small_decoder(9, norm="batch"), "DecoderConfig.norm is 'batch'"),
        (lambda: PPOConfig(num_epochs=0), "ppo.num_epochs must be >= 1, not 0"),
        (lambda: PPOConfig(num_minibatches=0), "ppo.num_minibatches"),
        (lambda: PPOConfig(gae_lambda=1.01), "ppo.gae_lambda"),
        (lambda: PPOConfig(gamma=0), "ppo.gamma"),
        (lambda: PPOConfig(clip_range=0), "ppo.clip_range"),
        (lambda: PPOConfig(kl_coef=-0.1), "ppo.kl_coef"),
        (lambda: TrainConfig(steps=0), "train.steps must be >= 1, not 0"),
        (lambda: TrainConfig(prompt_length=0), "train.prompt_length"),
        (lambda: PPOConfig(advantage="group"), "has no place with ppo.advantage='group'"),
        (
            lambda: TrainConfig(ppo=PPOConfig(advantage="group", kl_in="loss")),
            "set answers_per_prompt to 2 or more",
        ),
        (
            lambda: TrainConfig(prompts_per_step=6, ppo=PPOConfig(num_minibatches=4)),
            r"ppo.num_minibatches \(4\) must divide the 6",
        ),
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
        from_json(TrainConfig, {"sampling": {"top_p": 3.0}})


def test_settings_are_frozen_and_a_user_error_is_a_value_error():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TRAIN.steps = 3
    assert issubclass(UserError, ValueError)


def test_defaults_are_the_papers():
    ppo, optimizer = PPOConfig(), OptimizerConfig()
    assert (ppo.gamma, ppo.gae_lambda, ppo.clip_range, ppo.kl_target) == (1.0, 0.95, 0.2, None)
    assert (optimizer.learning_rate, optimizer.eps, optimizer.schedule) == (3e-6, 1e-5, "linear")
