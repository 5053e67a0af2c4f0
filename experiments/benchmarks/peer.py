"""Runs another system's script on a work that its own table lacks.

    ENVIRONMENT/bin/python -m experiments.benchmarks.peer PEERS/tunix_grpo.py --work V

`compare.py` starts it in the root of the repository. The script has a table `WORK` of dicts with the fields
of `Work` and a function `main` that reads the command line.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

from experiments.benchmarks.works import WORKS

script = sys.argv[1]
spec = importlib.util.spec_from_file_location(Path(script).stem, script)
assert spec is not None and spec.loader is not None, f"{script} is no Python file"
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for name, work in WORKS.items():
    module.WORK.setdefault(name, dataclasses.asdict(work))
sys.argv = sys.argv[1:]
module.main()
