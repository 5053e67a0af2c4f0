"""The dense layer of every block: a matrix product and, where there is one, a low-rank adapter."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype


def flat_dot(x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, **options: Any) -> jax.Array:
    """Computes x [..., I] times kernel [I, O] as one plain matrix product: the `dot_general` of a Dense.

    The kernel's gradient then contracts one axis of rows. Over two axes, XLA on CPUs first writes the other
    factor transposed and recomputes the activations that lead to it on the way, which takes as long as the
    product itself.

    Args:
        x: [..., I].
        kernel: [I, O].
        dimension_numbers: not used: a Dense always contracts the last axis of x with the first of the kernel.
        **options: those of `jax.lax.dot_general`, such as precision.

    Returns:
        [..., O].
    """
    del dimension_numbers  # a Dense has only these
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Dense):
    """Flax's Dense, which adds (x A) B where its parameters hold `lora_a` [I, r] and `lora_b` [r, O].

    `LoRAConfig.join` puts them there, with the scale in B (Hu 2021, eq. 3). The product A B is never formed: neither it
    nor a gradient of its size is in a program.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the outputs [..., O] of x [..., I]."""
        y: jax.Array = super().__call__(x)
        if not self.has_variable("params", "lora_a"):
            return y
        a: jax.Array = self.get_variable("params", "lora_a")
        b: jax.Array = self.get_variable("params", "lora_b")
        x, a, b = promote_dtype(x, a, b, dtype=self.dtype)
        return y + flat_dot(flat_dot(x, a), b)
