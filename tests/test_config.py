"""Composition against what the recipes promise, and mistakes as one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from selfsight import config as configuration
from selfsight.build import build, compose
from selfsight.config import ConfigError, check, flat, published
from selfsight.signatures import signature

ROOT = Path(__file__).parents[1]


def composed(*overrides: str):
    return check(compose("pretrain", list(overrides)))


def values(*overrides: str) -> dict:
    return configuration.flat(composed(*overrides))


SEER = {
    "batch_size": 8192,
    "images_per_device": 16,
    "gpus": 512,
    "images": 1_000_000_000,
    "steps": 122_070,
    "precision": "fp16",
    "activation_checkpointing": True,
    "sync_batchnorm_group": 64,
    "method.prototypes": [16000],
    "method.temperature": 0.1,
    "method.epsilon": 0.05,
    "method.sinkhorn_iterations": 10,
    "method.freeze_prototypes_steps": 313,
    "method.queue_length": 0,
    "views.global.size": 224,
    "views.global.count": 2,
    "views.global.scale": [0.14, 1.0],
    "views.local.size": 96,
    "views.local.count": 4,
    "views.local.scale": [0.05, 0.14],
    "optim.optimizer._target_": "selfsight.optim.lars.LARS",
    "optim.optimizer.momentum": 0.9,
    "optim.optimizer.trust_coefficient": 0.001,
    "optim.weight_decay": 1e-5,
    "optim.exclude_bias_and_norm": False,
    "schedule.lr._target_": "selfsight.schedules.warmup_cosine",
    "schedule.lr.start": 0.15,
    "schedule.lr.end": 0.0096,
    "schedule.lr.warmup_steps": 8000,
    "schedule.lr.steps": 122_070,
    "loader.prefetch": 4,
}
SWAV = {
    "batch_size": 256,
    "method.prototypes": [3000],
    "method.epsilon": 0.05,
    "method.sinkhorn_iterations": 3,
    "method.temperature": 0.1,
    "views.global.size": 224,
    "views.local.size": 96,
    "views.local.count": 6,
    "optim.weight_decay": 1e-6,
    "precision": "fp32",
    "sync_batchnorm_group": None,
    "epochs": 100,
    "steps": "auto",
}
TRUNKS = {
    "regnety_400mf": {"model.trunk.depth": 16, "model.head.widths": [440, 2048, 128]},
    "regnety_16gf": {
        "model.trunk_parameters": 80_565_140,
        "model.head.widths": [3024, 4096, 4096, 256],
        "model.head.batch_norm": True,
    },
    "regnety_256gf": {
        "model.trunk_parameters": 1_272_156_138,
        "model.head.widths": [10444, 8192, 8192, 256],
        "model.head.batch_norm": False,
    },
    "vit_small": {
        "model.trunk._target_": "selfsight.trunks.vit.VisionTransformer",
        "model.trunk.width": 384,
    },
}
PAIRS = [
    ("regnety_400mf", "folder", SWAV),
    ("regnety_400mf", "uncurated_stream", SWAV),
    ("regnety_16gf", "folder", SWAV),
    ("regnety_16gf", "uncurated_stream", SWAV),
    ("regnety_256gf", "folder", SEER),
    ("regnety_256gf", "uncurated_stream", SEER),
    ("regnety_256gf", "synthetic", SEER),
    ("vit_small", "folder", SWAV),
    ("vit_small", "uncurated_stream", SWAV),
]


@pytest.mark.parametrize(("model", "data", "recipe"), PAIRS)
def test_pairs_hold_what_the_recipes_promise(model, data, recipe):
    found = values(f"model={model}", f"data={data}")
    promised = {**recipe, **TRUNKS[model]}
    assert {key: found[key] for key in promised} == promised


def test_seer_learning_rate_is_written_per_256_images_and_resolved():
    found = values("model=regnety_256gf", "data=uncurated_stream")
    assert found["schedule.base_lr"] == 0.3
    assert found["schedule.lr.peak"] == pytest.approx(9.6)
    half = values("model=regnety_256gf", "data=uncurated_stream", "batch_size=4096")
    assert half["schedule.lr.peak"] == pytest.approx(4.8)
    assert (half["gpus"], half["steps"]) == (256, 244_140)


@pytest.mark.parametrize("key", [k for k, v in SEER.items() if isinstance(v, int | float)])
def test_the_command_line_wins_over_the_recipe(key):
    value = SEER[key]
    other = (not value) if isinstance(value, bool) else value * 2 if value else value + 8192
    if key == "images_per_device":
        other = 8
    if key in ("views.global.scale", "views.local.scale"):
        pytest.skip("a list")
    found = values("model=regnety_256gf", "data=uncurated_stream", f"{key}={other}")
    assert found[key] == other


def test_a_group_chosen_on_the_command_line_wins_over_the_recipe():
    found = values("model=regnety_256gf", "data=folder", "optim=adamw")
    assert found["optim.optimizer._target_"] == "selfsight.optim.adamw.AdamW"
    assert found["batch_size"] == 8192


MISTAKES = [
    (["batchsize=3"], "no key 'batchsize'; did you mean 'batch_size'?"),
    (["model.trunk.depht=3"], "did you mean 'model.trunk.depth'?"),
    (["+foo=1"], "'foo' is not a key"),
    (["+views.local.sise=3"], "'views.local.sise' is not a key"),
    (["+model.trunk.width_multiplier=2"], "'model.trunk.width_multiplier' is not a key of RegNetY"),
    (["modle=vit_small"], "did you mean 'model'?"),
    (["model=regnety_16"], "did you mean 'regnety_16gf'?"),
    (["batch_size=abc"], "batch_size='abc' must be a whole number"),
    (["optim=lars", "optim.optimizer.momentum=x"], "optim.optimizer.momentum='x' must be a number"),
    (["model.trunk.depth=2.5"], "model.trunk.depth=2.5 must be a whole number"),
    (["views.local.size=big"], "views.local.size='big' must be a whole number"),
    (["precision=fp8"], "precision=fp8 is not one of fp32, bf16, fp16"),
    (["method._target_=os.system"], "is not allowed"),
    (["method._target_=selfsight.methods.swav.SWAV"], "does not exist"),
    (["steps=null"], "a cosine needs an end"),
    (["epochs=3", "images=100"], "set one of them to null"),
    (["images_per_device=7"], "is not a multiple of images_per_device=7"),
    (["views.global.count=1", "views.local.count=0"], "at least two"),
    (["method.queue_length=100"], "must be a multiple of batch_size"),
    (["name=../up"], "must be a plain folder name"),
    (["checkpoint.every=0"], "must be at least 1"),
    (["steps=50", "schedule.lr.warmup_steps=60"], "schedule.lr.warmup_steps=60 is longer"),
    (["steps=-5"], "must be a positive number"),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=lambda v: str(v)[:40])
def test_mistakes_are_one_sentence(overrides, words):
    with pytest.raises(ConfigError) as error:
        composed(*overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_endless_runs_take_a_schedule_without_end():
    found = values("steps=null", "images=null", "schedule=warmup_plateau")
    assert found["steps"] is None
    assert found["schedule.lr._target_"] == "selfsight.schedules.Plateau"
    seer = ["model=regnety_256gf", "data=uncurated_stream", "steps=null"]
    found = values(*seer, "schedule=warmup_plateau")
    assert found["schedule.lr.warmup_steps"] == 8000
    assert found["schedule.lr.peak"] == pytest.approx(9.6)


def test_every_yaml_lists_every_argument_of_what_it_builds():
    """Hydra refuses unknown keys of a yaml; so a yaml that lists all arguments is strict, and one
    that forgets an argument makes it unreachable."""
    seen = 0
    for path in sorted((ROOT / "conf").glob("*/*.yaml")):
        for node in _targets(OmegaConf.to_container(OmegaConf.load(path))):
            found = signature(node["_target_"])
            assert found is not None, (path, node["_target_"])
            given = set(node) - {"_target_", "_partial_"}
            waits = (
                {"params", "step", "lr", "weight_decay", "in_width"}
                if node.get("_partial_")
                else set()
            )
            assert set(found.names) - waits == given - waits, path
            seen += 1
    assert seen > 20


def test_adamw_and_sgd_compose_with_every_schedule():
    for optimizer in ("adamw", "sgd", "lars"):
        for schedule in ("warmup_cosine", "warmup_plateau", "constant"):
            composed("data=folder", f"optim={optimizer}", f"schedule={schedule}")


def _targets(node):
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for child in node.values():
            yield from _targets(child)


def test_what_is_drawn_from_the_environment_is_not_written_down(monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CANARY", "canary")
    monkeypatch.setenv("SELFSIGHT_SIZE", "24")
    config = check(
        compose(
            "pretrain",
            [
                "tracking.wandb_project=my-${oc.env:SELFSIGHT_CANARY}",
                "runs_dir=${tracking.wandb_project}",
                "seed=${oc.env:SELFSIGHT_SIZE}",
            ],
        )
    )
    written = published(config)
    assert "canary" not in str(written)
    assert written["tracking"]["wandb_project"] == "my-${oc.env:SELFSIGHT_CANARY}"
    assert written["seed"] == "${oc.env:SELFSIGHT_SIZE}"
    assert flat(OmegaConf.create(written)) == flat(config)
    assert OmegaConf.create({"a": "${oc.env:SELFSIGHT_SIZE}"}).a == "24"


def test_build_refuses_targets_off_the_list():
    for target in ("os.system", "torch.load", "torch.hub.load", "selfsight.train.pretrain"):
        with pytest.raises(ConfigError, match="not allowed"):
            build(OmegaConf.create({"a": [{"_target_": target}]}))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/pretrain.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_literal_command_prints_seer():
    done = run("model=regnety_256gf", "data=uncurated_stream", "--cfg", "job", "--resolve")
    assert done.returncode == 0, done.stderr
    printed = OmegaConf.create(done.stdout)
    assert isinstance(printed, DictConfig)
    printed = configuration.flat(printed)
    for key, value in {**SEER, **TRUNKS["regnety_256gf"]}.items():
        assert printed[key] == value, key
    assert printed["schedule.lr.peak"] == pytest.approx(9.6)


def test_answers_come_without_torch():
    """`--cfg`, `--help` and mistakes are quick because nothing heavy is imported for them."""
    code = (
        "import sys; sys.argv = ['launch/pretrain.py', *{args!r}]\n"
        "import runpy\n"
        "try: runpy.run_path('launch/pretrain.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'torchvision', 'cv2', 'numpy') if m in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    for args in (["--cfg", "job", "--resolve"], ["--help"], ["batchsize=3"], ["batch_size=x"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(args=args)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.rstrip().endswith("HEAVY []"), (args, done.stdout[-300:], done.stderr)


def test_help_names_groups_and_keys():
    done = run("--help")
    assert done.returncode == 0
    for word in ("regnety_256gf", "uncurated_stream", "batch_size", "key=value"):
        assert word in done.stdout


def test_a_mistake_exits_with_2_and_no_traceback():
    done = run("batchsize=3")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "selfsight: there is no key 'batchsize'; did you mean 'batch_size'?"
    )
