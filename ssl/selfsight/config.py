"""The run's configuration: typed sections, resolvers, and checks that need neither torch nor data.

Hydra composes `conf/` into one tree. The keys of a run itself are typed here (`Run`); the nodes
with a `_target_` are checked against the signature of what they build, read from its source
without importing it. So a typo, a wrong type or an impossible combination is one sentence within
a second, before anything heavy is imported. Nothing else in the package reads configuration:
constructors take plain arguments.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from selfsight.sections import Run
from selfsight.signatures import Signature, signature

# What a `_target_` may name. Hydra itself would call torch.load or torch.hub.load.
ALLOWED_TARGETS = tuple(
    f"selfsight.{home}."
    for home in ("trunks", "heads", "methods", "optim", "schedules", "data.sources", "evals")
)


class ConfigError(ValueError):
    """A mistake in what the user asked for; its message is one sentence for the console."""


CHOICES: dict[str, tuple[Any, ...]] = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("fp32", "bf16", "fp16"),
    "resume": ("strict", "anyway"),
    "strategy": ("ddp", "fsdp"),
    "compress_gradients": (None, "bf16"),
    "pixels.bits": (8, 16),
    "loader.truncated": ("skip", "use"),
    "loader.colour": ("auto", "workers", "device"),
    "eval.kind": ("features", "classifier"),
    "cluster.kind": ("auto", "local", "slurm", "env"),
    "cluster.environment": ("strict", "anyway"),
    "cluster.gpu_request": ("node", "task", "gres"),
    "recovery.verdict": ("go_on", "stop", "roll_back"),
    "tracking.wandb": ("auto", "online", "offline", "off"),
}

# Sections whose keys are free of types here, with the keys their yamls may hold.
SECTION_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("name", "trunk_parameters", "trunk", "head"),
    "optim": (
        "optimizer",
        "weight_decay",
        "exclude_bias_and_norm",
        "layer_decay",
        "patch_embed_lr_factor",
        "trunk_lr_factor",
    ),
    "schedule": ("base_lr", "start", "end", "warmup_steps", "lr", "weight_decay"),
}

CROP_GROUP = "selfsight.data.multicrop.CropGroup"


# ------------------------------------------------------------------------------------ resolvers


def _updates(images: float | None, epochs: float | None, batch_size: int) -> int | str | None:
    if images is not None:
        return int(images) // batch_size
    return None if epochs is None else "auto"


def _epochs_in_steps(
    wanted: float, steps: int | str | None, epochs: float | None, share: float
) -> int:
    """Updates of `wanted` epochs, but at most `share` of the run; that share where the run's length
    is not given in epochs, and 100 where it has none."""
    if not isinstance(steps, int):
        return 100
    return int(steps * min(share, wanted / epochs if epochs else share))


def _scale_momentum(momentum: float, batch_size: int, published: int) -> float:
    """The momentum of an average whose batch was `published` images, for another batch: the same
    memory in images (Busbridge et al. 2023, "How to scale your EMA", arXiv:2307.13813)."""
    return momentum ** (batch_size / published)


def _devices(batch_size: int, images_per_device: int | None) -> int:
    return 1 if images_per_device is None else max(1, batch_size // images_per_device)


def _parameters_of(kind: str) -> Any:
    def count(trunk: Mapping[str, Any]) -> int:
        from selfsight.trunks import geometry, geometry_resnet

        home = geometry if hasattr(geometry, f"{kind}_parameters") else geometry_resnet
        return getattr(home, f"{kind}_parameters")(**trunk)

    return count


def _measured(what: str) -> Any:
    """Of a trunk of another library, whose sizes only it knows: `width` or `parameters`."""

    def measure(trunk: Mapping[str, Any]) -> int:
        from selfsight.trunks.libraries import measure

        plain = (
            OmegaConf.to_container(trunk, resolve=True) if isinstance(trunk, DictConfig) else trunk
        )
        return measure(plain)[what]

    return measure


def site_file() -> Path:
    """The one file that says where this site keeps its images: SELFSIGHT_SITE or conf/site.yaml."""
    default = Path(__file__).parents[2] / "conf" / "site.yaml"
    return Path(os.environ.get("SELFSIGHT_SITE", default))


def _site(key: str) -> Any:
    path = site_file()
    if not path.is_file():
        return None
    value = OmegaConf.select(OmegaConf.load(path), key)
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def register_resolvers() -> None:
    """Make the resolvers that `conf/` uses known to OmegaConf (idempotent)."""
    resolvers = {
        "scale_lr": lambda base, batch_size: base * batch_size / 256,
        "scale_lr_sqrt": lambda base, batch_size: base * math.sqrt(batch_size / 1024),
        "scale_momentum": _scale_momentum,
        "multiply": lambda a, b: a * b,
        "updates": _updates,
        "warmup": lambda steps, share: int(steps * share) if isinstance(steps, int) else 100,
        "epochs_in_steps": _epochs_in_steps,
        "devices": _devices,
        "regnety_parameters": _parameters_of("regnety"),
        "vit_parameters": _parameters_of("vit"),
        "where": lambda given, value: None if given is None else value,
        "resnet_parameters": _parameters_of("resnet"),
        "vt_parameters": _parameters_of("vt"),
        "measured_parameters": _measured("parameters"),
        "measured_width": _measured("width"),
        "site": _site,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


# --------------------------------------------------------------------------------------- checks


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` for the known word nearest to `word`, or the known words if few."""
    leaf = word.rsplit(".", 1)[-1]
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    match = get_close_matches(word, known, n=1, cutoff=0.6)
    match = match or [by_leaf[m] for m in get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.6)]
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; it knows {', '.join(known)}" if 0 < len(known) <= 14 else ""


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a tree, as a.b.c, without resolving anything."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
        for key in node:
            yield f"{prefix}{key}"
            yield from dotted_keys(node._get_node(key), f"{prefix}{key}.")


def flat(config: DictConfig | ListConfig) -> dict[str, Any]:
    """Every leaf of a configuration, resolved, as {"a.b.c": value}."""
    return flat_tree(OmegaConf.to_container(config, resolve=True))


def flat_tree(tree: Any) -> dict[str, Any]:
    """Every leaf of plain nested values."""
    leaves: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, child in node.items():
                walk(child, f"{path}.{key}" if path else str(key))
        else:
            leaves[path] = node

    walk(tree, "")
    return leaves


def published(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain resolved values, fit to be written down and sent.

    A text that is drawn from the environment may be a secret: it stays as it was written,
    `${oc.env:KEY}`.
    """
    drawn = False

    def noting(*arguments: Any) -> Any:
        nonlocal drawn
        drawn = True
        return oc.env(*arguments)

    def plain(node: Any) -> Any:
        if isinstance(node, DictConfig):
            return {key: value_of(node, key) for key in node}
        return [value_of(node, index) for index in range(len(node))]

    def value_of(node: Any, key: Any) -> Any:
        nonlocal drawn
        drawn = False
        value = node[key]
        if OmegaConf.is_config(value):
            return plain(value)
        return node._get_node(key)._value() if drawn and isinstance(value, str) else value

    OmegaConf.register_new_resolver("oc.env", noting, replace=True)
    try:
        return plain(config)
    finally:
        OmegaConf.clear_resolver("oc.env")
        OmegaConf.register_new_resolver("oc.env", oc.env)


def check(whole: DictConfig, sections: Mapping[str, str] | None = None) -> DictConfig:
    """Check a composed configuration and return it, typed sections converted.

    `sections` are those that a command has beside the run's: what each holds is the dataclass of
    that name (`selfsight.a.b.Name`), whose source is read as for `_target_` nodes.

    Raises:
        ConfigError: one sentence that names the key and, where there is one, the nearest known.
    """
    sections = sections or {}
    schema = OmegaConf.structured(Run)
    config = OmegaConf.masked_copy(whole, [str(key) for key in whole if key not in sections])
    for key in config:
        _known(str(key), list(Run.__dataclass_fields__), "the configuration")
        node = schema._get_node(str(key))
        if isinstance(node, DictConfig) and isinstance(config._get_node(key), DictConfig):
            for child in config[key]:
                _known(f"{key}.{child}", [f"{key}.{k}" for k in node], f"the section {key}")
    try:
        OmegaConf.merge(schema, config)  # types of what is written out
        _check_nodes(OmegaConf.to_container(config))
        counted = config.copy()
        if config.steps == "auto":  # known once the images are counted; any number till then
            counted.steps = 10**9
        resolved = counted.copy()
        OmegaConf.resolve(resolved)
        OmegaConf.merge(schema, resolved)  # and of what was computed
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None
    for key, choices in CHOICES.items():
        value = OmegaConf.select(resolved, key)
        if value not in choices:
            raise ConfigError(f"{key}={value} is not one of {', '.join(map(str, choices))}")
    for section, keys in SECTION_KEYS.items():
        for child in resolved[section] or {}:
            _known(f"{section}.{child}", [f"{section}.{k}" for k in keys], f"the section {section}")
    _check_nodes(OmegaConf.to_container(resolved))
    _check_combinations(resolved)
    for key, target in sections.items():
        node = whole[key]
        values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        check_section(key, values, target)
    return whole


def check_section(path: str, values: Any, target: str) -> None:
    """Check plain values against the fields of the dataclass `target`: names and plain types.

    Raises:
        ConfigError: one sentence that names the key and, where there is one, the nearest known.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}={values!r} must hold the keys of {target.rpartition('.')[2]}")
    _check_call(path, values, signature(target), exact=False)


def _known(key: str, known: Sequence[str], where: str) -> None:
    if key not in known:
        raise ConfigError(f"'{key}' is not a key of {where}{nearest(key, known)}")


def first_line(error: OmegaConfBaseException) -> str:
    """What OmegaConf says, as one sentence that begins with the key."""
    text = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    if match := re.match(r"Value (.*) of type '.*' could not be converted to (\w+)", text):
        value, wanted = match.groups()
        return f"{key}={value} must be {TYPE_WORDS.get(wanted, wanted)}"
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
    return f"{key}: {text}" if key else text


TYPE_WORDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def _check_nodes(tree: Any) -> None:
    """Check crop groups and `_target_` nodes of a plain tree. What is not resolved yet (a text that
    begins with `${`) passes."""
    views = tree.get("views")
    for name, group in views.items() if isinstance(views, dict) else ():
        _check_call(f"views.{name}", group or {}, signature(CROP_GROUP), exact=False)
    # the model before the method that refers to it, so that a mistake is named where it was made
    for key, child in sorted(tree.items(), key=lambda item: item[0] != "model"):
        check_targets(child, str(key))


def check_targets(node: Any, path: str) -> None:
    """Check every `_target_` node of a plain tree against what it names.

    Raises:
        ConfigError: one sentence that names the key at fault.
    """
    if isinstance(node, list):
        for index, child in enumerate(node):
            check_targets(child, f"{path}[{index}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        target = str(node["_target_"])
        if not target.startswith(ALLOWED_TARGETS):
            homes = ", ".join(a.rstrip(".") for a in ALLOWED_TARGETS)
            raise ConfigError(f"{path}._target_={target} is not allowed: a target lies in {homes}")
        found = signature(target)
        if found is None:
            raise ConfigError(f"{path}._target_={target} does not exist")
        arguments = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
        _check_call(path, arguments, found, exact=not node.get("_partial_", False))
    for key, child in node.items():
        check_targets(child, f"{path}.{key}")


def _check_call(
    path: str, arguments: Mapping[Any, Any], found: Signature | None, exact: bool
) -> None:
    assert found is not None, path
    names = [f"{path}.{n}" for n in found.names]
    for key, value in arguments.items():
        _known(f"{path}.{key}", names, found.name)
        if any(isinstance(v, str) and v.startswith("${") for v in (value, *_members(value))):
            continue
        if (wanted := found.refuses(str(key), value)) is not None:
            raise ConfigError(f"{path}.{key}={value!r} must be {wanted}")
    missing = [n for n in found.required if n not in arguments] if exact else []
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}, which {found.name} needs")


def _members(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _check_combinations(c: DictConfig) -> None:
    if c.images is not None and c.epochs is not None:
        raise ConfigError(
            f"images={c.images} and epochs={c.epochs} both set the length of the run: "
            "set one of them to null"
        )
    if not (c.steps in (None, "auto") or (isinstance(c.steps, int) and c.steps > 0)):
        raise ConfigError(f"steps={c.steps} must be a positive number of updates, or null")
    for key in ("batch_size", "images_per_device", "checkpoint.every", "tracking.log_every"):
        value = OmegaConf.select(c, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be at least 1")
    if c.images_per_device is not None and c.batch_size % c.images_per_device:
        raise ConfigError(
            f"batch_size={c.batch_size} is not a multiple of images_per_device="
            f"{c.images_per_device}; {divisors_text(c.batch_size, c.images_per_device)}"
        )
    if c.steps is None and "cosine" in str(c.schedule.lr.get("_target_", "")):
        raise ConfigError(
            "steps=null runs until it is stopped, and a cosine needs an end: "
            "set steps, images or epochs, or use schedule=warmup_plateau"
        )
    warmup = c.schedule.lr.get("warmup_steps") or 0
    if isinstance(c.steps, int) and warmup > c.steps:
        raise ConfigError(
            f"schedule.lr.warmup_steps={warmup} is longer than the run of steps={c.steps}: "
            "lower the one or raise the other"
        )
    if c.eval.every is not None and c.eval.every < 1:
        raise ConfigError(f"eval.every={c.eval.every} must be at least 1, or null")
    if c.pixels.channels < 1:
        raise ConfigError(f"pixels.channels={c.pixels.channels} must be at least 1")
    for key in ("mean", "std"):
        given = len(c.pixels[key])
        if not c.pixels.estimate and given != c.pixels.channels:
            raise ConfigError(
                f"pixels.{key} has {given} values and pixels.channels={c.pixels.channels}: give "
                "one a channel, or set pixels.estimate=1000 to estimate them from so many images"
            )
    plain = c.pixels.channels == 3 and c.pixels.bits == 8
    if c.loader.colour == "device" and not plain:
        raise ConfigError(
            "loader.colour=device works on 8-bit RGB: leave it at auto for other pixels"
        )
    crops = [int(g.get("count", 1)) for g in (c.views or {}).values()]
    least = 1 if c.eval.kind == "classifier" else 2  # labels stand in for a second view
    if sum(crops) < least:
        needs = "one crop" if least == 1 else "two"
        raise ConfigError(f"views has {sum(crops)} crops in all: learning needs at least {needs}")
    if len(c.eval.split) != 3 or min(c.eval.split) < 0 or abs(sum(c.eval.split) - 1) > 1e-6:
        raise ConfigError(f"eval.split={list(c.eval.split)} must be three shares that add up to 1")
    queue = c.method.get("queue_length", 0) or 0
    if queue % c.batch_size:
        raise ConfigError(
            f"method.queue_length={queue} must be a multiple of batch_size={c.batch_size}"
        )
    if c.name is not None and (Path(c.name).name != c.name or c.name in (".", "..")):
        raise ConfigError(f"name={c.name!r} must be a plain folder name, without '/'")


def divisors_text(batch_size: int, near: int) -> str:
    """`... divides 256: 16, 32` for the divisors of a batch size nearest to a wish."""
    divisors = [d for d in range(1, math.isqrt(batch_size) + 1) if batch_size % d == 0]
    divisors += [batch_size // d for d in divisors]
    best = sorted(sorted(set(divisors), key=lambda d: abs(d - near))[:4])
    return f"{batch_size} is divided by {', '.join(map(str, best))}"
