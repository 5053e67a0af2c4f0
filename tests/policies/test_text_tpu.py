"""What a decoding step moves on a TPU: the program is compiled ahead of time, with no TPU there, and its bytes counted.

Needs libtpu (`pip install libtpu`), which is in no list of requirements: without it the tests are skipped. This file is also
the program that compiles: `python -m tests.policies.test_text_tpu v5e:2x4 8 1 1` in an environment as `ENVIRONMENT` has it.
"""

import functools
import glob
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import pytest

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, V = 2, 1024, 16, 8, 64, 2048, 4096
ROWS, ANSWERS, P, T = 256, 4, 256, 512  # ROWS answers on each group of tensor devices
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


class Array(NamedTuple):
    """A shape of the program: dimensions, layout (minor first), tile (minor first), and whether it lies in HBM."""

    item: int
    dims: list[int]
    order: list[int]
    tile: list[int]
    hbm: bool

    def bytes(self, dims: list[int] | None = None) -> int:
        """What it takes in HBM, whole tiles; `dims`: what a part of that shape touches."""
        sizes = [(dims or self.dims)[axis] for axis in self.order]
        tile = self.tile + [1] * (len(sizes) - len(self.tile))
        return self.item * math.prod(-(-size // step) * step for size, step in zip(sizes, tile)) * self.hbm


class Instruction(NamedTuple):
    name: str
    op: str
    arrays: list[Array]
    operands: list[str]
    arguments: str
    attributes: str

    @property
    def calls(self) -> str:
        found = re.search(r"calls=%?([\w.-]+)", self.attributes)
        return found[1] if found else ""


def arrays(text: str) -> list[Array]:
    found = []
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?", text):
        if dtype not in ITEM_BYTES:
            continue
        numbers = lambda pattern, layout=layout: [
            int(x) for m in re.findall(pattern, layout) for x in m.split(",") if x
        ]
        shape = [int(x) for x in dims.split(",") if x]
        order = numbers(r"^\{([\d,]+)") or list(range(len(shape)))[::-1]
        found.append(Array(ITEM_BYTES[dtype], shape, order, numbers(r"T\(([\d,]+)\)")[::-1], "S(" not in layout))
    return found


def until_closed(text: str) -> int:
    """Where the parenthesis that `text` begins with ends."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    raise ValueError(text)


def parse(program: str) -> dict[str, dict[str, Instruction]]:
    """Computations by name, each its instructions by name."""
    computations: dict[str, dict[str, Instruction]] = {}
    for line in re.sub(r"/\*index=\d+\*/", "", program).splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.-]+).*\{$", line)
        if opened and not line.startswith("HloModule"):
            current = computations.setdefault(opened[1], {})
        assigned = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line)
        if assigned:
            name, rest = assigned.groups()
            cut = until_closed(rest) + 1 if rest.startswith("(") else rest.index(" ")
            kind, rest = rest[:cut], rest[cut + 1 :]
            op, rest = rest[: rest.index("(")], rest[rest.index("(") :]
            inside, after = rest[1 : until_closed(rest)], rest[until_closed(rest) + 1 :]
            current[name] = Instruction(name, op, arrays(kind), re.findall(r"%([\w.-]+)", inside), inside, after)
    return computations


FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "async-update", "copy-done")
FREE += ("slice-done", "async-done", "all-reduce-done", "all-gather-done")


def hbm_bytes(computations: dict[str, dict[str, Instruction]], body: dict[str, Instruction]) -> int:
    """Bytes that one pass through `body` reads from HBM and writes to it; each operand of each instruction once.

    What lies in the fast memory costs nothing, nor does bringing an array there cost more than its one reading. An
    update in place reads and writes the tiles that it touches (one that covers its tiles only writes them).
    """
    return sum(moved(computations, body, instruction) for instruction in body.values())


def update(target: Array, part: Array) -> int:
    touched = target.bytes(part.dims)
    return touched if touched == target.item * math.prod(part.dims) else 2 * touched


def moved(
    computations: dict[str, dict[str, Instruction]], body: dict[str, Instruction], instruction: Instruction
) -> int:
    op, out = instruction.op, instruction.arrays
    assert op not in ("while", "conditional", "call"), f"{instruction.name}: the count knows no loops in the loop"
    operands = [body[name].arrays[:1] for name in instruction.operands]
    if op in FREE or "ConcatBitcast" in instruction.attributes:
        return 0
    if op == "copy-start":  # (destination, source, ...)
        return operands[0][0].bytes() + out[0].bytes()
    inner = computations.get(instruction.calls, {})
    if op == "async-start" and any(x.op == "slice" for x in inner.values()):  # ((operand), destination, ...)
        return operands[0][0].bytes(out[1].dims) + out[1].bytes()
    if op == "dynamic-update-slice":
        return update(operands[0][0], operands[1][0]) + operands[1][0].bytes()
    if op in ("slice", "dynamic-slice"):
        return operands[0][0].bytes(out[0].dims) + out[0].bytes()

    def users(name: str) -> list[tuple[Instruction, bool]]:
        """Who uses a value in the fusion, and whether as the first operand; a bitcast's users are its operand's."""
        using = [x for x in inner.values() if name in x.operands]
        return [pair for x in using for pair in (users(x.name) if x.op == "bitcast" else [(x, x.operands[0] == name)])]

    parameters = {int(x.arguments): x.name for x in inner.values() if x.op == "parameter"}
    total, in_place = 0, False
    for place, operand in enumerate(operands):
        if not operand or not operand[0].hbm:
            continue
        using = users(parameters[place]) if place in parameters else []
        ops = {x.op for x, first in using} if all(first for _, first in using) else set()
        if ops and ops <= {"gather", "slice", "dynamic-slice"}:
            total += min(operand[0].bytes(), sum(x.arrays[0].item * math.prod(x.arrays[0].dims) for x, _ in using))
        elif ops == {"dynamic-update-slice"}:
            total += sum(update(operand[0], inner[x.operands[1]].arrays[0]) for x, _ in using)
            in_place = True
        else:
            total += operand[0].bytes()
    return total + (0 if in_place else sum(x.bytes() for x in out))


def compiled(lowered: Any) -> str:
    """The program of a TPU that `jax.jit(f).lower(...)` becomes; `as_text` of the compiled one cannot read every program."""
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (path,) = glob.glob(f"{folder}/*after_optimizations.txt")
        with open(path) as file:
            return file.read()


def compile_for(topology: str, shape: tuple[int, int, int]) -> dict:
    """What a step of the decoding loop moves on one chip of a mesh data x fsdp x tensor, and what it would have to."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from rlaif_jax.models import CausalLM
    from rlaif_jax.models.decoder_config import DecoderConfig
    from rlaif_jax.models.sampling import SamplingConfig
    from rlaif_jax.parallel import BATCH, make_mesh, state_shardings
    from rlaif_jax.policies import decoding
    from rlaif_jax.policies.text import generate
    from rlaif_jax.types import Prompts

    jax.default_backend = lambda: "tpu"  # the process itself has CPUs only
    decoding.FIRST_BUCKET = T  # one loop, with the whole caches
    data, fsdp, tensor = shape
    mesh = make_mesh(*shape, devices=list(topologies.get_topology_desc(topology, platform="tpu").devices))
    model = CausalLM(
        DecoderConfig(
            vocab_size=V,
            num_layers=LAYERS,
            width=WIDTH,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            mlp_width=MLP,
            context_length=P + T,
            compute_dtype="bfloat16",
        )
    )
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.eval_shape(model.init, jax.random.key(0))
    prompts = ROWS * data * fsdp // ANSWERS
    batch = Prompts(
        *(
            jax.ShapeDtypeStruct(s, d)
            for s, d in (((prompts, P), jnp.int32), ((prompts, P), bool), ((prompts,), jnp.uint32))
        )
    )
    run = functools.partial(
        generate,
        model,
        sampling=SamplingConfig(max_new_tokens=T),
        answers=ANSWERS,
        eos_id=2,
        pad_id=0,
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(
            jax.tree.map(place, params, state_shardings(params, mesh)),
            jax.tree.map(lambda x: place(x, NamedSharding(mesh, BATCH)), batch),
            place(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec())),
        )
        program = compiled(lowered)
    computations = parse(program)
    body = max((computations[name] for name in re.findall(r"body=%?([\w.-]+)", program)), key=len)
    weights = sum(
        np.prod(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key in ("kernel", "embedding")
    )
    column = LAYERS * 2 * KV_HEADS * HEAD_DIM  # numbers of keys and values a token
    cache = ROWS * KV_HEADS * (T - 1) * HEAD_DIM // tensor
    caches = [x for x in body.values() if any(math.prod(a.dims) == cache for a in x.arrays)]
    in_hbm = [x for x in caches if any(a.hbm and math.prod(a.dims) == cache for a in x.arrays)]
    gathered = [a.dims for x in body.values() if x.op.startswith("all-gather") for a in x.arrays]
    return {
        "moved": hbm_bytes(computations, body),
        "needed": 2 * int(weights + column * (ROWS // ANSWERS * P + ROWS * (T - 1))) // tensor,
        "updates": sum(x.op == "dynamic-update-slice" for x in caches),
        "other_caches": [x.name for x in in_hbm if x.op not in (*FREE, "dynamic-update-slice", "copy-start")],
        "copies": [x.name for x in in_hbm if x.op == "copy-start" and x.arrays[0].hbm],
        "gathered": gathered,
    }


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("topology", "shape", "most"),
    [("v5e:2x4", (8, 1, 1), 1.0), ("v5p:2x2x2", (2, 2, 2), 1.15)],
    ids=["v5e", "v5p"],
)
def test_a_decoding_step_moves_the_weights_and_the_caches_once(topology, shape, most):
    command = [sys.executable, __file__, topology, *map(str, shape)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["updates"] == 2 * LAYERS, "keys and values are updated where they lie"
    assert not found["other_caches"]
    assert not found["copies"]
    assert not [dims for dims in found["gathered"] if WIDTH in dims], "weights stay where they are"
    assert found["moved"] <= most * found["needed"], found["moved"] / found["needed"]


if __name__ == "__main__":
    print(json.dumps(compile_for(sys.argv[1], tuple(map(int, sys.argv[2:])))))
