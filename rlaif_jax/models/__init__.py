"""The only place that knows Flax. Outside it a model is a frozen object whose methods take a pytree of parameters."""

from rlaif_jax.models.decoder import Decoder, Trunk
from rlaif_jax.models.heads import LanguageModel, ScalarModel, ValueHead, last_real

__all__ = ["Decoder", "LanguageModel", "ScalarModel", "Trunk", "ValueHead", "last_real"]
