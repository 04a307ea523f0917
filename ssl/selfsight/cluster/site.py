"""What this site is like: its one file, and the fields of a job script, checked.

Every field ends up in a script that a shell runs, so none may hold a newline or another control
character: in a header of the script it would begin a command.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from selfsight.config import ConfigError, nearest, site_file

KEYS = {
    "stream": ("shards",),
    "slurm": (
        "partition", "account", "qos", "constraint", "reservation", "time", "gpus_per_node",
        "gpu_type", "cpus_per_task", "memory", "exclusive", "container", "container_mounts",
        "setup", "env", "srun", "sbatch",
    ),
}  # fmt: skip

# Options of sbatch that follow from others of ours, or would change what the job script is.
OWN_OPTIONS = (
    "array", "dependency", "error", "export", "gpus-per-node", "gpus-per-task", "job-name", "nodes",
    "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue",
    "signal", "test-only", "wait", "wrap",
)  # fmt: skip

TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE")
MEMORY = re.compile(r"\d+(\.\d+)?|\d+[KMGT]B?")
PLAIN = re.compile(r"[\w.,:@%+=/()&|*!\[\]-]+")
OPTION = re.compile(r"[a-z][a-z0-9-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_site(path: Path | None = None) -> dict[str, Any]:
    """The site file as a plain tree, nothing if there is none.

    Raises:
        ConfigError: it cannot be read, or has a key that is not known; one sentence.
    """
    path = path or site_file()
    if not path.is_file():
        return {}
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, yaml.YAMLError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"the site file {path} cannot be read: {line}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"the site file {path} must hold sections: {', '.join(KEYS)}")
    for section, values in tree.items():
        if section not in KEYS:
            raise ConfigError(
                f"'{section}' is not a section of the site file {path}"
                f"{nearest(str(section), list(KEYS))}"
            )
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ConfigError(f"the section {section} of the site file {path} must hold keys")
        for key in values:
            if key not in KEYS[section]:
                raise ConfigError(
                    f"'{section}.{key}' is not a key of the site file {path}"
                    f"{nearest(str(key), KEYS[section])}"
                )
    return {str(section): values or {} for section, values in tree.items()}


def fields(cluster: DictConfig) -> dict[str, Any]:
    """The checked fields of a job script, from the section `cluster` and the site file.

    Returns:
        By name: the plain ones as text or None; `setup`, `srun` and `container_mounts` as lists of
        text, `env` and `sbatch` as {name: text or true}, `exclusive` as a bool.

    Raises:
        ConfigError: one sentence that names the field.
    """
    site = read_site().get("slurm", {})
    found: dict[str, Any] = {}
    for name, form in (
        ("partition", PLAIN), ("account", PLAIN), ("qos", PLAIN), ("constraint", PLAIN),
        ("reservation", PLAIN), ("gpu_type", PLAIN), ("time", TIME), ("memory", MEMORY),
        ("container", None),
    ):  # fmt: skip
        found[name] = _text(f"cluster.{name}", cluster[name], form)
    for name in ("setup", "srun", "container_mounts"):
        values = _plain(cluster[name])
        values = site.get(name) if values is None else values
        if values is not None and not isinstance(values, list):
            raise ConfigError(f"cluster.{name} must be a list of texts, [...]")
        found[name] = [
            _text(f"cluster.{name}[{i}]", v, None, tabs=name == "setup")
            for i, v in enumerate(values or [])
        ]
    for name, form, what in (
        ("env", VARIABLE, "a variable of the environment"),
        ("sbatch", OPTION, "a long option of sbatch without its dashes"),
    ):
        values = _plain(cluster[name])
        for given in (values, site.get(name)):
            if given is not None and not isinstance(given, Mapping):
                raise ConfigError(f"cluster.{name} must hold names and values, {{name: value}}")
        merged = {**(site.get(name) or {}), **(values or {})}
        for key in merged:
            if not isinstance(key, str) or not form.fullmatch(key):
                raise ConfigError(f"cluster.{name}: {key!r} is not {what}")
        found[name] = {
            k: True if v is True and name == "sbatch" else _text(f"cluster.{name}.{k}", v, None)
            for k, v in merged.items()
            if v is not None
        }
    for option in found["sbatch"]:
        if option in OWN_OPTIONS:
            raise ConfigError(f"cluster.sbatch.{option} is set by the launch itself: leave it out")
    found["exclusive"] = bool(cluster.exclusive)
    return found


def clean(what: str, text: str) -> str:
    """The text, if it has no newline or other control character.

    Raises:
        ConfigError: it has.
    """
    if not text.isprintable():
        bad = next(c for c in text if not c.isprintable())
        raise ConfigError(f"{what} holds the control character {bad!r}, which a job script may not")
    return text


def _text(what: str, value: Any, form: re.Pattern[str] | None, tabs: bool = False) -> str | None:
    if value is None:
        return None
    if isinstance(value, Mapping | list):
        raise ConfigError(f"{what}={value!r} must be one value")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    clean(what, text.replace("\t", " ") if tabs else text)
    if not text or (form is not None and not form.fullmatch(text)):
        raise ConfigError(f"{what}={text!r} is not what sbatch understands there")
    return text


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
