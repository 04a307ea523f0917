"""From a configuration to running objects: the only Hydra import of the package.

`application` turns a function of a checked configuration into a command with Hydra's grammar
(`key=value`, groups, `--cfg job --resolve`, `--help`, `-m`), and `build` turns a `_target_` node
into the object it describes.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from selfsight import config as configuration
from selfsight.config import ConfigError

EXIT_USER_ERROR = 2


def build(node: Any) -> Any:
    """Build the object of a `_target_` node; its class must be on the allow-list.

    A node with `_partial_: true` gives a callable that waits for its remaining arguments.

    Raises:
        ConfigError: the target is not allowed.
        ValueError: the constructor refuses its arguments.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    for target in _targets(plain):
        if not target.startswith(configuration.ALLOWED_TARGETS):
            raise ConfigError(f"_target_={target} is not allowed")
    try:
        return hydra.utils.instantiate(OmegaConf.create(plain), _convert_="all")
    except HydraException as error:  # Hydra wraps what a constructor raises
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _targets(node: Any) -> list[str]:
    if isinstance(node, list):
        return [t for child in node for t in _targets(child)]
    if not isinstance(node, dict):
        return []
    own = [str(node["_target_"])] if "_target_" in node else []
    return own + [t for child in node.values() for t in _targets(child)]


def application(
    name: str,
    run: Callable[[DictConfig, str], None],
    conf: Path | None = None,
    *,
    sections: Mapping[str, str] | None = None,
    named_after: Sequence[str] = ("method", "model", "data"),
    sweep: Callable[[list[tuple[DictConfig, str]]], None] | None = None,
    check: Callable[[DictConfig], DictConfig] | None = None,
) -> None:
    """Run a command: compose `conf/{name}.yaml` with the command line, check it, call `run`.

    `run` gets the checked configuration and the run's name: the one that is set, or the choices of
    the groups `named_after` and the time. `sections` are those that the command has beside the
    run's, as `config.check` takes them. `sweep` gets all runs of a multirun (`-m`) together, each
    with a name of its own; without it they run one after the other. `check` replaces the check of a
    run's configuration, for a command whose keys are others. A mistake in the command line,
    found here or later (a `ValueError`), is one sentence on stderr and exit status 2, no traceback.
    """
    # Before torch is imported: OpenMP threads that wait for each other in a loop starve the
    # loader's processes, and on busy cores themselves (tried: 2 threads on 2 shared cores, 5 times
    # slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = str(conf or Path(__file__).parents[2] / "conf")
    configuration.register_resolvers()
    asks_hydra = {"--help", "-h", "--hydra-help", "--version", "--info", "-i"} & set(sys.argv[1:])
    check = check or partial(configuration.check, sections=sections)
    overrides = [a for a in sys.argv[1:] if not a.startswith("-") and "=" in a]
    sweeps = {"-m", "--multirun"} & set(sys.argv[1:])
    if not asks_hydra and not sweeps:
        _or_exit(lambda: check(compose(name, overrides, folder)))

    collected: list[tuple[DictConfig, str]] = []

    def task(config: DictConfig) -> None:
        choices = HydraConfig.get().runtime.choices
        if "overrides" in config:
            config.overrides = list(HydraConfig.get().overrides.task)
        words = [choices[group] for group in named_after]
        name = config.name or "-".join([*words, time.strftime("%Y%m%d-%H%M%S")])
        if sweeps and sweep is not None:
            _or_exit(lambda: collected.append((check(config), name)))
        else:
            _or_exit(lambda: run(check(config), name))

    hydra.main(version_base="1.3", config_path=folder, config_name=name)(task)()
    if collected and sweep is not None:
        names = [name for _, name in collected]
        if len(set(names)) < len(names):
            names = [f"{name}-{number}" for number, name in enumerate(names)]
        runs = [(config, name) for (config, _), name in zip(collected, names, strict=True)]
        _or_exit(lambda: sweep(runs))


def compose(name: str, overrides: list[str], folder: str | Path | None = None) -> DictConfig:
    """Compose `conf/{name}.yaml` with overrides as on the command line.

    Raises:
        ConfigError: one sentence with the nearest key or choice.
    """
    configuration.register_resolvers()
    folder = str(folder or Path(__file__).parents[2] / "conf")
    # inside a command Hydra has composed that one's configuration already, and knows only one
    hydra_of_command = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=folder):
            try:
                return hydra.compose(config_name=name, overrides=overrides)
            except (HydraException, OmegaConfBaseException) as error:
                raise ConfigError(_sentence(name, overrides, error)) from None
    finally:
        GlobalHydra.instance().hydra = hydra_of_command


def _sentence(name: str, overrides: list[str], error: Exception) -> str:
    """Hydra's several lines as one sentence that names the key and the nearest known one."""
    text = str(error)
    cause = error.__cause__
    match = re.search(r"Could not override '([^']+)'", text)
    if match and not isinstance(cause, ValidationError):
        key = match.group(1)
        choices = [o for o in overrides if re.split("[=@]", o.lstrip("+"))[0] in _groups()]
        known = list(configuration.dotted_keys(hydra.compose(name, overrides=choices)))
        return f"there is no key '{key}'{configuration.nearest(key, [*known, *_groups()])}"
    if match := re.search(r"Could not find '([^/']+)/([^']+)'", text):
        group, choice = match.groups()
        available = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        near = configuration.nearest(choice, available)
        return f"{group}={choice} does not exist{near}" + (
            "" if near else f"; it is one of {', '.join(available)}"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(cause, OmegaConfBaseException) and getattr(cause, "full_key", None):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return " ".join(lines[:2])


def _groups() -> list[str]:
    folder = Path(__file__).parents[2] / "conf"
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def _or_exit(action: Callable[[], Any]) -> None:
    try:
        action()
    except ValueError as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"selfsight: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("selfsight: interrupted", file=sys.stderr)
        sys.exit(130)
