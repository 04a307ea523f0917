"""The configuration of an evaluation: what `eval=NAME[,NAME...]` means, and checks without torch."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfsight import config as configuration
from selfsight.config import ConfigError, check_targets, first_line, nearest
from selfsight.sections import Evaluation

CONF = Path(__file__).parents[3] / "conf"
DURING_A_RUN = "online"  # the one of conf/eval that is no evaluation of its own
# data=synthetic brings a recipe of pretraining with it, and more images than tell anything
SYNTHETIC = ["data=scenes", "features.limit_train=5000", "features.limit_test=1000"]


def evaluator_names() -> list[str]:
    """All that `eval=` may name."""
    found = (path.stem for path in (CONF / "eval").glob("*.yaml"))
    return sorted(set(found) - {DURING_A_RUN})


def expand(arguments: Sequence[str]) -> list[str]:
    """A command line with `eval=a,b` as Hydra takes it: every evaluator a node of its own.

    Raises:
        ConfigError: an evaluator that does not exist; the nearest is named.
    """
    known = evaluator_names()
    found: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "data" and value == "synthetic":
            found = [*SYNTHETIC, *found]
            continue
        if key != "eval":
            found.append(argument)
            continue
        for name in filter(None, (n.strip() for n in value.strip("[]").split(","))):
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.5)
                said = f"did you mean '{near[0]}'?" if near else f"it is one of {', '.join(known)}"
                raise ConfigError(f"eval={name} does not exist; {said}")
            found.append(f"+eval@eval.{name}={name}")
    return list(dict.fromkeys(found))


def check_evaluation(config: DictConfig) -> DictConfig:
    """Check a composed configuration of launch/evaluate.py and return it; the data of the run is
    put in where none is given.

    Raises:
        ConfigError: one sentence that names the key.
    """
    schema = OmegaConf.structured(Evaluation)
    for key in config:
        _known(str(key), list(Evaluation.__dataclass_fields__), "the configuration")
        node = schema._get_node(str(key))
        if isinstance(node, DictConfig) and isinstance(config._get_node(key), DictConfig):
            for child in config[key]:
                _known(f"{key}.{child}", [f"{key}.{k}" for k in node], f"the section {key}")
    if not config.eval:
        raise ConfigError(f"say what to measure: eval={', '.join(evaluator_names())}, or several")
    if config.data is None:
        config.data = _data_of_the_run(config)
    try:
        resolved = config.copy()
        OmegaConf.resolve(resolved)
        OmegaConf.merge(schema, resolved)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None
    for key in ("device", "precision", "loader.truncated", "cluster.kind", "cluster.environment",
                "cluster.gpu_request", "tracking.wandb"):  # fmt: skip
        value, choices = OmegaConf.select(resolved, key), configuration.CHOICES[key]
        if value not in choices:
            raise ConfigError(f"{key}={value} is not one of {', '.join(map(str, choices))}")
    for key in ("image_size", "features.batch_size", "features.limit_train", "features.limit_test"):
        value = OmegaConf.select(resolved, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be at least 1")
    if (config.run is None) == (config.trunk is None):
        both = " and not both" if config.run is not None else ""
        raise ConfigError(f"say what to evaluate: run=runs/NAME, or trunk=FILE,{both}".rstrip(","))
    plain: Any = OmegaConf.to_container(resolved)
    check_targets(plain["eval"], "eval")
    check_targets(plain["data"], "data")
    return config


def place(config: DictConfig) -> Path:
    """The folder of the results."""
    if config.out is not None:
        return Path(config.out).expanduser()
    if config.run is not None:
        return Path(config.run).expanduser() / "evals"
    name = config.name or Path(config.trunk).stem
    return Path(config.runs_dir).expanduser() / name / "evals"


def short_name(data: DictConfig) -> str:
    """What tables call the data where `data_name` is not set: a word of where it is."""
    train = OmegaConf.to_container(data.train, resolve=True)
    assert isinstance(train, dict)
    train = train.get("source", train)
    if "name" in train:
        return str(train["name"])
    for key in ("path", "table", "shards", "root"):
        value = train.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value:
            path = Path(str(value))
            stem = path.parent.name if key == "shards" or path.stem == "train" else path.stem
            return "".join(c if c.isalnum() or c in "-_" else "_" for c in stem) or "data"
    return "scenes" if "Scenes" in str(train.get("_target_")) else "data"


def _data_of_the_run(config: DictConfig) -> Any:
    if config.run is None:
        raise ConfigError(
            "say on which images: data=cifar10, data=class_folders data.path=..., ..."
        )
    file = Path(config.run).expanduser() / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{file} is not there, so it is not known on which images: give data=...")
    return OmegaConf.load(file).data


def _known(key: str, known: Sequence[str], where: str) -> None:
    if key not in known:
        raise ConfigError(f"'{key}' is not a key of {where}{nearest(key, known)}")
