"""LoRA (Hu 2021): a small adapter learns, the weights under it do not.

An adapter is a tree with `lora_a` [in, r] and `lora_b` [r, out] at the paths where the base model's tree has `kernel`
[in, out]. The layers compute y = x W + b + scale (x A) B (`dense.Dense`). Parts with weights of their own, such as a critic's
head, are in the same tree and replace or complement those of the base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlaif_jax.config import require
from rlaif_jax.types import Params

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = ("q", "k", "v", "o", "gate", "up", "down")
Put = Callable[[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]  # (W, A, B) -> what takes the place of W


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter of a model's blocks.

    Attributes:
        rank: r, columns of A and rows of B.
        alpha: the product A B counts alpha / rank.
        targets: the matrices of every block that have an adapter: of the attention q, k, v, o; of the perceptron gate, up,
            down. GPT-2's blocks have no gate.
        rslora: the product counts alpha / sqrt(rank) instead, so that a higher rank learns as fast as a low one (rsLoRA,
            Kalajdzievski 2023, eq. 3).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[Target, ...] = TARGETS
    rslora: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank must be >= 1, not {self.rank}")
        require(0 < self.alpha < math.inf, f"lora.alpha must be > 0 and finite, not {self.alpha}")
        unknown = [target for target in self.targets if target not in TARGETS]
        require(not unknown, f"lora.targets names {_listed(unknown)}; known are {_listed(TARGETS)}")
        once = len(set(self.targets)) == len(self.targets) > 0
        require(once, f"lora.targets must name one matrix or more, each once, not {_listed(self.targets) or 'none'}")

    def check_used(self, lora: bool) -> None:
        """Raises UserError where settings are given of an adapter that does not learn.

        Args:
            lora: whether an adapter learns.
        """
        require(
            lora or self == LoRAConfig(), "--adapter.* are settings of an adapter, which does not learn: add --lora"
        )

    @property
    def scale(self) -> float:
        """Returns the factor of A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, key: jax.Array, base: Params) -> Params:
        """Returns a fresh adapter: A uniform in +-1 / sqrt(in), B zero, which changes nothing yet.

        That is Kaiming's uniform initialiser with a = sqrt(5), as peft draws A.

        Args:
            key: the random key.
            base: the parameters under the adapter; their shapes are enough.

        Raises:
            UserError: the blocks lack a target, or the rank is higher than any of their matrices can have.
        """
        flat = flatten_dict(base)
        kernels = {path[:-1]: leaf.shape for path, leaf in flat.items() if path[-2:-1] and path[-1] == "kernel"}
        there = [target for target in TARGETS if any(path[-1] == target for path in kernels)]
        lacking = [target for target in self.targets if target not in there]
        require(
            not lacking,
            f"lora.targets names {_listed(lacking)}, which the blocks of this model do not have: give --adapter.targets "
            f"{' '.join(there)}",
        )
        chosen = sorted(path for path in kernels if path[-1] in self.targets)
        largest = max(max(kernels[path]) for path in chosen)
        require(
            self.rank <= largest,
            f"lora.rank is {self.rank}, more than the {largest} rows or columns of the largest of these matrices: no product "
            "has a higher rank than its result",
        )
        made: dict[tuple[str, ...], jax.Array] = {}
        for path, one in zip(chosen, jax.random.split(key, len(chosen))):
            fan_in, fan_out = kernels[path]
            bound = fan_in**-0.5
            made[*path, "lora_a"] = jax.random.uniform(one, (fan_in, self.rank), minval=-bound, maxval=bound)
            made[*path, "lora_b"] = jnp.zeros((self.rank, fan_out))
        return unflatten_dict(made)

    def join(self, base: Params, params: Params) -> Params:
        """Returns base and adapter as one tree, which a model reads; no product A B is formed.

        Args:
            base: the parameters under the adapter.
            params: the adapter, and other parts in full; an empty dict gives the base alone.

        Raises:
            UserError: the adapter does not fit the base.
        """
        return self._over(base, params, lambda kernel, a, b: {"kernel": kernel, "lora_a": a, "lora_b": self.scale * b})

    def merge(self, base: Params, params: Params) -> Params:
        """Returns plain parameters, with scale A B added to the kernels, as `save_model` takes them.

        Args:
            base: the parameters under the adapter.
            params: the adapter, and other parts in full.

        Raises:
            UserError: the adapter does not fit the base.
        """
        exact = jax.lax.Precision.HIGHEST  # a TPU would round the factors to bfloat16
        added = lambda kernel, a, b: {"kernel": kernel + self.scale * jnp.matmul(a, b, precision=exact)}
        return self._over(base, params, added)

    def _over(self, base: Params, params: Params, put: Put, where: str = "") -> Params:
        """Returns `base` with the leaves of `params`; `put` makes what takes the place of a kernel."""
        if "lora_a" not in params:
            inner = lambda name, part: self._over(base.get(name, {}), part, put, f"{where}{name}/")
            return base | {name: inner(name, part) if isinstance(part, dict) else part for name, part in params.items()}
        a, b, kernel = params["lora_a"], params["lora_b"], base.get("kernel")
        require(kernel is not None, f"the adapter has a matrix at {where[:-1]}, where its base has none")
        assert kernel is not None
        wanted = ((kernel.shape[0], self.rank), (self.rank, kernel.shape[1]))
        require(
            (a.shape, b.shape) == wanted,
            f"the adapter's matrices at {where[:-1]} have the shapes {a.shape} and {b.shape}; its base and lora.rank="
            f"{self.rank} ask for {wanted[0]} and {wanted[1]}",
        )
        return base | put(kernel, a, b)


def joined(lora: LoRAConfig | None, base: Params, params: Params, *, merge: bool = False) -> Params:
    """Returns the parameters that a model reads: base and adapter joined, or `params` alone.

    Args:
        lora: the adapter's settings; None: `params` are whole.
        base: `Frozen.base`; None where no part of the run has an adapter.
        params: the parameters that learn, or a reference's.
        merge: add the adapter to the base's matrices instead; for passes without gradients.

    Raises:
        UserError: there are settings and no base.
    """
    if lora is None:
        return params
    require(base is not None, "there are settings of an adapter (lora), but no weights under it: give them as `base`")
    return lora.merge(base, params) if merge else lora.join(base, params)


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))
