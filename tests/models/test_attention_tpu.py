"""The update's attention on a TPU: its gradient is compiled ahead of time, with no TPU there, and its kernels looked at.

Needs libtpu like `tests/policies/test_text_tpu.py`. This file is also the program that compiles.
"""

import collections
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.policies.test_text_tpu import ENVIRONMENT, compiled, parse

HEADS, KV_HEADS, WIDTH = 8, 4, 1024
GROUPS, ANSWERS, P, T = 8, 4, 384, 384  # the numbers of columns are no other dimension's


def compile_for(topology: str, shape: tuple[int, int, int]) -> dict:
    """The kernels in the gradient of grouped answers on a mesh data x fsdp x tensor, what has the shape of scores, and what
    is exchanged between devices."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding

    from rlaif_jax.models import CausalLM
    from rlaif_jax.models.decoder_config import DecoderConfig
    from rlaif_jax.parallel import BATCH, make_mesh, state_shardings
    from tests.helpers import sequences_view

    jax.default_backend = lambda: "tpu"  # the process itself has CPUs only
    mesh = make_mesh(*shape, devices=list(topologies.get_topology_desc(topology, platform="tpu").devices))
    model = CausalLM(
        DecoderConfig(
            vocab_size=4096,
            num_layers=2,
            width=WIDTH,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=128,
            mlp_width=2048,
            context_length=P + T,
            compute_dtype="bfloat16",
        )
    )

    def loss(params, tokens, prompt_mask, response_mask):
        view = sequences_view(tokens, prompt_mask, response_mask, ANSWERS)
        hidden = model.hidden(params, view)
        logprobs, _ = model.token_logprobs(params, hidden, view.targets)
        return jnp.where(response_mask, logprobs, 0.0).sum()

    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    rows = lambda columns, dtype: jax.ShapeDtypeStruct(
        (GROUPS * ANSWERS, columns), dtype, sharding=NamedSharding(mesh, BATCH)
    )
    params = jax.eval_shape(model.init, jax.random.key(0))
    placed = jax.tree.map(place, params, state_shardings(params, mesh))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).lower(placed, rows(P + T, jnp.int32), rows(P, bool), rows(T, bool))
        program = parse(compiled(lowered))
    instructions = [(body, x) for body in program.values() for x in body.values()]
    kernels = [(body, x) for body, x in instructions if 'custom_call_target="tpu_custom_call"' in x.attributes]
    lengths = {P - 1, P, T, P + T - 1, P + T}
    return {
        "kernels": collections.Counter(x.name.split("_segmented")[0] for _, x in kernels),
        "operands": [[a.dims for name in x.operands for a in body[name].arrays[:1]] for body, x in kernels],
        "exchanges": [x.name for _, x in instructions if x.op.startswith("all-to-all")],
        "scores": [a.dims for _, x in instructions for a in x.arrays if sum(n in lengths for n in a.dims) > 1],
    }


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_update_attends_by_kernels_forward_and_backward():
    data, fsdp, tensor = shape = (2, 2, 2)
    command = [sys.executable, "-m", "tests.models.test_attention_tpu", "v5e:2x4", *map(str, shape)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Prompts among themselves, but not in the last block, where nobody reads them; answers to both; each with its gradients.
    assert found["kernels"] == {"splash_mha_fwd": 3, "splash_mha_dq": 3, "splash_mha_dkv": 3}
    assert not found["scores"], "scores stay in the kernels"
    assert not found["exchanges"], "activations stay with their rows"
    prompts = GROUPS // (data * fsdp)
    for operands in found["operands"]:
        # Every group of tensor devices takes its own rows, every device its own heads.
        queries, keys = [dims for dims in operands if len(dims) == 4][:2]
        assert tuple(queries) in {(n, HEADS // tensor, T, 128) for n in (prompts, prompts * ANSWERS)}
        assert keys[:2] == [queries[0], KV_HEADS // tensor]


if __name__ == "__main__":
    print(json.dumps(compile_for(sys.argv[1], tuple(map(int, sys.argv[2:])))))
