"""The command line of a script: options from a dataclass, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from rlaif_jax.config import CheckFailed, Diverged, UserError, from_json, require, to_json
from rlaif_jax.progress.startup import Loading

Config = TypeVar("Config")
Result = TypeVar("Result")


OF_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC)
"""What is wrong with a file, and not with this program."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM ends a script as Ctrl-C does: what is paid for or half written is finished."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/rlaif_jax/xla."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        base = Path(os.environ.get("RLAIF_JAX_CACHE", Path.home() / ".cache" / "rlaif_jax"))
        jax.config.update("jax_compilation_cache_dir", str(base / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def ended_worse(metrics: Mapping[str, Any]) -> bool:
    """Returns whether the entry `verdict` of what a recipe returns is "worse" (see `command_line`)."""
    return metrics.get("verdict") == "worse"


def command_line(
    main: Callable[[Config], Result],
    default: Config,
    description: str | None = None,
    *,
    loading: Loading | None = None,
    failed: Callable[[Result], bool] = lambda result: False,
    pages: Mapping[str, Callable[[], str]] = {},
    named: Mapping[str, Mapping[str, Any]] = {},
) -> Result:
    """Parses the command line into a config, calls `main` with it and returns the result of `main`.

    A choice between dataclasses is written as a word, `ppo.advantage:leave-one-out`; the options of the chosen
    class may be anywhere after the word.

    With `--resume`, the settings of the run in the folder `--out` take the place of the defaults: no other option is needed.
    With `--config FILE`, those of a JSON file do, such as the config.json of another run; with `--config NAME`, those of
    `named`.

    Args:
        main: a function of the config.
        default: a frozen dataclass: its fields are the options, its values the defaults.
        description: the text of --help.
        loading: what the script has shown while its imports ran; ends here.
        failed: whether the result of `main` is a failure though everything was written, such as `ended_worse`.
        pages: option -> a text that it prints, in the place of a run: help that is too long for --help.
        named: name -> settings, as JSON values; what they leave out has its default.

    Raises:
        SystemExit: with status 2 and one line on stderr for bad input, with 1 when a check of the run failed, a loss is
            not finite, the run has diverged or its result is a failure, with 130 on Ctrl-C and 143 on SIGTERM.
    """
    if loading is not None:
        loading.done()
    try:
        before = signal.signal(signal.SIGTERM, _terminate)
    except ValueError:  # not the main thread: signals are somebody else's
        before = None
    try:
        config = _parse_arguments(default, description, pages, named)
        use_compilation_cache()
        result = main(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (CheckFailed, Diverged, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of the output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: nobody reads the output any more", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        sys.exit(128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT))
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if failed(result):
        sys.exit(1)
    return result


CONFIG_HELP = """

--config FILE.json begins with the settings in a file, such as the config.json of another run; what it leaves out has its
default, and options count more."""


def _parse_arguments(
    default: Config,
    description: str | None,
    pages: Mapping[str, Callable[[], str]] = {},
    named: Mapping[str, Mapping[str, Any]] = {},
) -> Config:
    try:
        for option, text in pages.items():
            if option in sys.argv[1:]:
                print(text(), flush=True)
                sys.exit(0)
        default, arguments = _from_file(_resumed(default, sys.argv[1:]), sys.argv[1:], named)
        names = f"\n\n--config NAME begins with named settings: {', '.join(named)}." if named else ""
        config = tyro.cli(
            type(default),
            args=arguments,
            default=default,
            description=(description or "") + CONFIG_HELP + names,
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
    except BrokenPipeError:  # the reader of --help has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    _check_numbers(to_json(config))
    return config


def _check_numbers(settings: Any, name: str = "") -> None:
    """Raises UserError where a setting is NaN, which tyro takes for a number.

    Args:
        settings: the settings, as JSON values.
        name: their dotted name.
    """
    if isinstance(settings, dict):
        for key, value in settings.items():
            _check_numbers(value, f"{name}.{key}" if name else key)
    elif isinstance(settings, list):
        for value in settings:
            _check_numbers(value, name)
    else:
        require(settings == settings, f"{name} should be a number, not NaN")


def _from_file(
    default: Config, arguments: Sequence[str], named: Mapping[str, Mapping[str, Any]] = {}
) -> tuple[Config, list[str]]:
    """Returns (the settings of `--config`, a file or a name, else `default`, the other arguments).

    Raises:
        UserError: the file cannot be read, holds other settings, or a run is to be resumed, too.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--config", type=Path)
    try:
        given, others = options.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"--config: {error.message}; give a JSON file of settings") from error
    path: Path | None = given.config
    if path is None:
        return default, others
    require("--resume" not in others, "--config begins a run, and --resume goes on with one: give one of them")
    values: Any = named.get(str(path))
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig")) if values is None else dict(values)
    except (OSError, ValueError, RecursionError) as error:
        known = f"; named settings are {', '.join(named)}" if named and not path.exists() else ""
        raise UserError(f"{path}: cannot be read as JSON ({error}){known}") from error
    require(isinstance(values, dict), f"{path}: settings are one JSON object")
    own = to_json(default)
    kept = {name: value for name, value in own.items() if name in ("out", "resume")}
    try:
        return from_json(type(default), _completed(values, own) | kept, str(path)), others
    except UserError as error:  # that of a class which checks itself does not know the file
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from None


def _completed(values: Any, default: Any) -> Any:
    """Returns JSON values of settings with what they leave out as in `default`, at every depth.

    Another choice between dataclasses has the defaults of its class.
    """
    if not (isinstance(values, dict) and isinstance(default, dict)):
        return values
    if values.get("type", default.get("type")) != default.get("type"):
        return values
    return default | {name: _completed(value, default.get(name)) for name, value in values.items()}


def _resumed(default: Config, arguments: Sequence[str]) -> Config:
    """Returns the settings of the run that the arguments resume; `default` where they resume none.

    Raises:
        UserError: the run's config.json is damaged or of another script or version.
    """
    values = {field.name: vars(default)[field.name] for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    if not {"out", "resume"} <= values.keys():
        return default
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--out", type=Path, default=values["out"])
    options.add_argument("--resume", action=argparse.BooleanOptionalAction, default=values["resume"])
    try:
        given, _ = options.parse_known_args(arguments)
    except argparse.ArgumentError:  # tyro says it better
        return default
    path = given.out / "config.json"
    if not given.resume or not path.exists():
        return default
    try:
        saved = json.loads(path.read_text()) | {"out": str(given.out), "resume": True}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: this is no run's settings ({error})") from error
    return from_json(type(default), saved, f"{path}, of another script or version")
