"""Models, the only place that knows Flax: frozen objects whose methods take a pytree of parameters."""

from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.decoder import Decoder, Trunk
from rlaif_jax.models.heads import ScalarModel, ValueHead, gather_last

__all__ = ["CausalLM", "Decoder", "ScalarModel", "Trunk", "ValueHead", "gather_last"]
