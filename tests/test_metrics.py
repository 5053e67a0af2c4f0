"""metrics.jsonl across kills, resumes and full disks; TensorBoard events as another reader sees them."""

import errno
import json
import math
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from rlaif_jax import metrics
from rlaif_jax.config import UserError
from rlaif_jax.metrics import MetricsWriter, read_metrics, without_time
from tests.helpers import read_terminal

ROOT = Path(__file__).parents[1]


def writer(folder, **settings):
    return MetricsWriter(folder, **({"terminal": False, "sinks": ()} | settings))


@contextmanager
def rl(folder, total=None, resume_from=None, **settings):
    with writer(folder, **settings) as out, out.stage("rl", total, resume_from=resume_from) as log:
        yield log


def steps(path, stage=None):
    return [line["step"] for line in read_metrics(path, stage)]


def test_a_value_is_read_back_with_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    values = list(rng.normal(size=50) * 10.0 ** rng.integers(-300, 300, 50)) + [0.1, 5e-324, -0.0]
    singles = list(rng.normal(size=50).astype(np.float32))
    with rl(tmp_path) as log:
        for step, value in enumerate(values + singles):
            log.write(step, {"x": value})
    back = [line["x"] for line in read_metrics(tmp_path)]
    assert struct.pack("103d", *back) == struct.pack("103d", *map(float, values + singles))
    assert [np.float32(value) for value in back[53:]] == singles


def test_scalars_of_jax_and_numpy_and_what_is_no_number(tmp_path):
    import jax.numpy as jnp

    with rl(tmp_path) as log:
        log.write(3, {"a": jnp.float32(0.5), "b": np.int64(7), "c": True, "d": np.array(2.0), "e": None})
        log.write(4, {"a": math.nan, "b": jnp.inf, "c": -math.inf})
    first, second = read_metrics(tmp_path)
    assert without_time(first) == {"step": 3, "stage": "rl", "a": 0.5, "b": 7, "c": 1, "d": 2.0, "e": None}
    assert without_time(second) == {"step": 4, "stage": "rl", "a": None, "b": None, "c": None}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("values", [{"step": 1.0}, {"stage": 1.0}, {"x": np.zeros(2)}, {"x": "high"}])
def test_what_is_no_scalar_is_refused_and_leaves_no_line(tmp_path, values):
    with rl(tmp_path) as log:
        with pytest.raises((UserError, ValueError), match="metrics"):
            log.write(1, values)
        log.write(2, {"x": 1.0})
    assert steps(tmp_path) == [2]


def test_a_line_is_on_the_disk_when_write_returns(tmp_path):
    with rl(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"x": 1.0})
            assert steps(tmp_path) == list(range(1, step + 1))


def test_resume_drops_later_lines_of_the_loop_and_keeps_the_stages(tmp_path):
    with writer(tmp_path) as out:
        with out.stage("sft", 30) as sft:
            for step in range(1, 31):
                sft.write(step, {"loss": 1 / step})
        with out.stage("rl", 20) as log:
            for step in range(1, 16):
                log.write(step, {"reward": float(step)})
    with rl(tmp_path, 20, resume_from=10) as log:
        assert steps(tmp_path, "rl") == list(range(1, 11))
        for step in range(11, 21):
            log.write(step, {"reward": -float(step)})
    assert steps(tmp_path, "sft") == list(range(1, 31))
    assert steps(tmp_path, "rl") == list(range(1, 21))
    assert [line["reward"] for line in read_metrics(tmp_path, "rl")][9:11] == [10.0, -11.0]
    elapsed = [line["time/elapsed_s"] for line in read_metrics(tmp_path)]
    assert elapsed == sorted(elapsed)


def test_a_stage_that_starts_again_replaces_its_own_lines_only(tmp_path):
    with writer(tmp_path) as out, out.stage("rl", 2) as log:
        log.write(1, {"reward": 1.0})
        for resume_from, expected in ((None, [1, 2]), (None, [1, 2]), (1, [1, 2])):
            with out.stage("lm", 2, resume_from=resume_from) as lm:
                for step in expected if resume_from is None else [2]:
                    lm.write(step, {"loss": 1.0})
            assert steps(tmp_path, "lm") == expected
        log.write(2, {"reward": 1.0})
    with writer(tmp_path):
        pass
    assert steps(tmp_path, "rl") == [1, 2]  # nothing goes before the stage starts again
    with rl(tmp_path) as log:
        log.write(1, {"reward": 2.0})
    assert steps(tmp_path, "rl") == [1]
    assert steps(tmp_path, "lm") == [1, 2]


def test_the_clock_goes_on_from_the_largest_elapsed_of_any_stage(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with writer(tmp_path) as out:
        for name in ("sft", "rl"):
            with out.stage(name, None) as log:
                for step in (1, 2):
                    clock[0] += 10.0
                    log.write(step, {"x": 1.0})
    assert [line["time/elapsed_s"] for line in read_metrics(tmp_path)] == [10.0, 20.0, 30.0, 40.0]
    clock[0] = 5.0  # another process, perhaps on another machine
    with rl(tmp_path, resume_from=1) as log:  # the time of the dropped step was spent all the same
        clock[0] += 1.0
        log.write(2, {"x": 1.0})
    assert [line["time/elapsed_s"] for line in read_metrics(tmp_path)] == [10.0, 20.0, 30.0, 41.0]
    with rl(tmp_path) as log:  # nor does a stage that starts again set the clock back
        log.write(1, {"x": 1.0})
    assert [line["time/elapsed_s"] for line in read_metrics(tmp_path)] == [10.0, 20.0, 41.0]


@pytest.mark.parametrize("tail", [b'{"step": 4, "rew', b"{", b'{"step": 4, "text": "\xc3', b"\x00\x00\x00"])
def test_a_half_written_last_line_is_dropped(tmp_path, tail):
    with rl(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"reward": 1.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert steps(tmp_path) == [1, 2, 3]
    with rl(tmp_path, resume_from=3) as log:
        log.write(4, {"reward": 2.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}')
    with rl(tmp_path, resume_from=2) as log:
        log.write(3, {"x": 3})
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("bad", ['{"step": 2, "x', "[1]", '{"x": 1}', '{"step": 1.5}', '"step"'])
def test_damage_in_the_middle_names_file_and_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        writer(tmp_path)
    assert len(path.read_text().splitlines()) == 3


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(tmp_path) == []


def test_kill_9_at_any_moment_leaves_a_file_that_resumes(tmp_path):
    program = (
        "import sys; from pathlib import Path; from rlaif_jax.metrics import MetricsWriter\n"
        "with MetricsWriter(Path(sys.argv[1]), terminal=False) as out, out.stage('rl', None) as log:\n"
        "    for step in range(1, 10**9): log.write(step, {f'value_{i}': i / 7 for i in range(40)})"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 100_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = steps(tmp_path)
    assert found == list(range(1, len(found) + 1))
    assert len(found) > 50
    with rl(tmp_path, resume_from=40) as log:
        log.write(41, {"value_0": 1.0})
    assert steps(tmp_path) == list(range(1, 42))


# -- what goes wrong outside -----------------------------------------------------------------------


def test_a_file_in_the_place_of_the_folder_is_a_message(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run/metrics\.jsonl: cannot be written"):
        writer(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_a_message(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Permission denied\)"):
        writer(tmp_path)


def test_a_read_only_file_system_is_a_message(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"run/metrics\.jsonl: cannot be written \(Read-only file system\)"):
        writer(tmp_path / "run")


def test_a_disk_that_fills_up_is_a_message_and_the_lines_before_stay(tmp_path):
    # A limit on the size of files fails in the same places as a full disk, with a real error of the system.
    def write_on(log):
        for step in range(2, 1000):
            log.write(step, {"x": 1.0})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with rl(tmp_path, sinks=None) as log:
        log.write(1, {"x": 1.0})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written .*space"):
                write_on(log)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = steps(tmp_path)
    assert len(found) > 20
    assert found == list(range(1, len(found) + 1))


# -- TensorBoard -----------------------------------------------------------------------------------


def events(folder):
    """All events of a folder, in the order of the files' names, read by the TFRecord format alone."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def scalars(folder):
    """{(tag, step): value} as TensorBoard shows it: a start event hides its step and later ones before it."""
    shown = {}
    for event in events(folder):
        if event.HasField("session_log"):
            shown = {place: value for place, value in shown.items() if place[1] < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = value.simple_value
    return shown


def test_events_of_a_resumed_run_show_every_step_once_a_stage(tmp_path):
    with MetricsWriter(tmp_path, terminal=False) as out:
        with out.stage("sft", 20) as sft:
            for step in range(1, 21):
                sft.write(step, {"loss": 0.5})
        with out.stage("rl", 8) as log:
            for step in range(1, 8):
                log.write(step, {"reward": 1.0, "kl": math.nan})
    with rl(tmp_path, 8, resume_from=5, sinks=None) as log:
        log.write(6, {"reward": 2.0})
        log.write(7, {"reward": 2.0})  # the first write flushes by itself
        log.flush()
        assert scalars(tmp_path / "tensorboard" / "rl")["reward", 7] == 2.0
    assert scalars(tmp_path / "tensorboard" / "rl") == {("reward", s): 1.0 if s < 6 else 2.0 for s in range(1, 8)}
    assert len(scalars(tmp_path / "tensorboard" / "sft")) == 20


class Tracker:
    """What a tracker such as Weights & Biases would be: a sink that keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def start(self, stage, total, resume_from):
        self.calls.append(("start", stage, total, resume_from))

    def write(self, stage, step, values):
        self.calls.append(("write", stage, step, dict(values)))

    def flush(self):
        self.calls.append(("flush",))

    def end(self, stage):
        self.calls.append(("end", stage))

    def close(self):
        self.calls.append(("close",))


def test_a_sink_sees_every_stage_and_only_finite_numbers_or_none(tmp_path):
    trackers = [Tracker(), Tracker()]
    with writer(tmp_path, sinks=trackers) as out:
        with out.stage("sft", 1) as sft:
            sft.write(1, {"loss": np.float32(0.5)})
        with out.stage("rl", None, resume_from=4) as log:
            log.write(5, {"reward": math.nan})
            log.flush()
    assert trackers[0].calls == trackers[1].calls
    assert trackers[0].calls == [
        ("start", "sft", 1, None),
        ("write", "sft", 1, {"loss": 0.5}),
        ("end", "sft"),
        ("start", "rl", None, 4),
        ("write", "rl", 5, {"reward": None}),
        ("flush",),
        ("end", "rl"),
        ("close",),
    ]


# -- the terminal ----------------------------------------------------------------------------------


def test_plain_lines_are_rare_and_include_the_last(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with rl(tmp_path, terminal=True, total=101) as log:
        for step in range(1, 102):
            log.write(step, {"reward": 0.25, "kl": 1.5, "loss": 3.0, "time/tokens_per_s": 1234.5})
            clock[0] += 0.5
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == [f"{step}/101" for step in range(1, 102, 4)]
    assert lines[0] == "[rl] step 1/101  reward 0.250  KL 1.500  loss 3.0000  1,234 tokens/s"
    assert lines[1].endswith("0:48 left")
    assert lines[-1].endswith("1,234 tokens/s")


def test_the_last_line_is_printed_when_the_run_ends_between_two(tmp_path, capsys):
    with writer(tmp_path, terminal=True) as out, out.stage("lm", None) as lm:
        for step in (1, 2, 3):
            lm.write(step, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines() == ["[lm] step 1  loss 1.0000", "[lm] step 3  loss 1.0000"]


def test_no_terminal_no_output(tmp_path, capsys):
    with rl(tmp_path, terminal=False) as log:
        log.write(1, {"reward": 1.0})
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


PROGRAM = """
import sys, time
from pathlib import Path
from rlaif_jax.metrics import MetricsWriter
with MetricsWriter(Path(sys.argv[1]), sinks=()) as out:
    with out.stage("sft", 2) as sft:
        sft.write(1, {"loss": 0.5}); sft.write(2, {"loss": 0.25})
    with out.stage("rl", 9) as log:
        for step in range(1, 10):
            log.write(step, {"reward": 0.125 * step, "kl": 2.0})
            print("a line of the program" if step == 5 else "", end="\\n" if step == 5 else "", flush=True)
            time.sleep(.05)
print("end")
"""


def test_a_terminal_gets_a_bar_a_stage_and_keeps_the_programs_lines(tmp_path):
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=child, stderr=child, env=environment, cwd=ROOT
    )
    os.close(child)
    text = read_terminal(parent)
    assert process.wait() == 0
    assert "\x1b[" in text
    assert "━" in text
    assert "sft" in text
    assert "loss 0.2500" in text
    assert "9/9" in text
    assert "reward 1.125  KL 2.000" in text
    assert "a line of the program" in text
    assert text.rstrip().endswith("end")
    assert [line["step"] for line in read_metrics(tmp_path, "rl")] == list(range(1, 10))


def test_a_reader_that_goes_away_does_not_stop_the_run(tmp_path):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM.split('    with out.stage("rl"')[0], str(tmp_path)],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    os.close(write)
    assert steps(tmp_path, "sft") == [1, 2], process.stderr.decode()


def test_lines_are_json_objects_of_one_line_each(tmp_path):
    with rl(tmp_path) as log:
        log.write(1, {"rm/accuracy": 0.5, "naïve": 1.0})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == ["step", "stage", "rm/accuracy", "naïve", "time/elapsed_s"]
