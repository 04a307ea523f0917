"""The typed sections of a run's configuration, with what each key means."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Checkpoint:
    every: int = 500
    """Updates between two checkpoints."""
    keep: int = 2
    """Newest complete checkpoints kept, at least two."""
    keep_every: int | None = None
    """Those of a step that it divides stay, and the trunk is exported then."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory."""
    at_end: bool = True
    """Also save after the last update."""


@dataclass
class Loader:
    workers: int | None = None
    """Loader processes per device; null: one on CPU, a share of the cores, at most 8, per GPU."""
    prefetch: int = 2
    """Batches prepared ahead."""
    max_pixels: int = 100_000_000
    """Images that declare more pixels than this are not decoded."""
    max_bytes: int = 100_000_000
    """Nor are encoded images longer than this."""
    max_side: int = 65_535
    """Nor are images with a longer side."""
    truncated: str = "skip"
    """Images that end early or are damaged: `skip`, or `use` what can be decoded of them."""
    min_decoded: float = 0.5
    """Least share of its rows that such an image must have."""
    reduced: bool = True
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where no crop is enlarged by it."""
    colour: str = "auto"
    """Where colour, blur and the like are done: `workers`, `device`, or `auto`: device on CUDA."""
    max_bad_share: float = 0.3
    """A run ends where a larger share of the last thousand samples could not be used."""
    decode_seconds: float = 60.0
    """A sample whose decoding takes longer is passed over, and the worker replaced."""
    fetch_seconds: float = 900.0
    """The same for fetching a sample, or opening its shard."""
    growth_gb: float = 4.0
    """A worker whose memory grows by more is replaced."""


@dataclass
class Pixels:
    channels: int = 3
    """Of the images: 3 for RGB, 1 for grey, or as many as the files have."""
    bits: int = 8
    """Kept of each channel: 8 or 16."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Channel means subtracted from pixels in [0, 1]."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Channel standard deviations divided by."""
    estimate: int = 0
    """Images from which mean and std are estimated when the run starts; 0: they are as given."""


@dataclass
class Cluster:
    kind: str = "auto"
    """Where the job runs: `local`, this machine; `slurm`, submitted with sbatch; `env`, in a world
    that another launcher made; `auto` chooses and says why."""
    processes: int | None = None
    """Processes of the job, one a device; null: as many as `gpus` says on SLURM, all GPUs of this
    machine elsewhere, one on CPU."""
    threads: int | None = None
    """Compute threads per process; null: its share of the cores but one, for the loader."""
    timeout_minutes: float = 30.0
    """A collective that takes longer than this ends the job."""
    restarts: int | None = None
    """Failures in a row, without a new checkpoint between them, after which a job is started again;
    null: 3 on SLURM, 0 elsewhere."""
    environment: str = "strict"
    """A run goes on with the package versions it was started with; `anyway`: with any."""
    chosen: str | None = None
    """What `auto` chose and why; written by the launch."""
    nodes: int | None = None
    """Machines of a SLURM job; null: as many as its processes fill."""
    gpus_per_node: int | None = None
    """GPUs of one machine; null: 8."""
    gpu_request: str = "node"
    """How GPUs are asked for: `node` (--gpus-per-node, every process sees all), `task`
    (--gpus-per-task, each sees one) or `gres` (--gres=gpu:...)."""
    gpu_type: str | None = None
    """Type of GPU, as SLURM calls it."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time: Any = None
    """Time limit of a SLURM job: minutes, or as sbatch writes it (2-00:00:00); null: the
    partition's."""
    cpus_per_task: int | None = None
    memory: Any = None
    """Memory of a node: a number of GB, or as sbatch writes it (0: all)."""
    exclusive: bool | None = None
    """Whole machines."""
    signal_seconds: int = 120
    """A job is warned so long before its time limit, and saves."""
    parallel: int = 64
    """Jobs of a sweep that run at the same time."""
    container: str | None = None
    """Image for srun --container-image (pyxis)."""
    container_mounts: Any = None
    """List of SOURCE:TARGET for the container."""
    setup: Any = None
    """Shell lines run on the first node before the job; null: those of the site file."""
    env: Any = None
    """Environment variables of the job, added to those of the site file. No secrets: they are
    written down."""
    srun: Any = None
    """More arguments of srun; null: those of the site file."""
    sbatch: Any = None
    """More options of sbatch, {name: value}, added to those of the site file."""


@dataclass
class TrunkStart:
    init: str | None = None
    """Weights that the trunk starts from: a file or folder in any known layout, or a run."""
    allow_partial: bool = False
    """Also where tensors are missing or left over."""
    heads: bool = True
    """Take the heads too, where the file has them and they fit."""
    head_warmup: Any = "auto"
    """Freeze the trunk until the head has settled: `auto`, where a head is new; true or false."""
    warmup_steps: int = 1000
    """Updates after which the trunk is let go in any case."""
    warmup_window: int = 50
    """Updates whose mean losses are compared."""
    warmup_gain: float = 0.01
    """The head has settled where a window's loss is lower by less than this share."""
    guard: float | None = 0.1
    """The run ends where k-NN falls by a larger share below that of the start; null: never."""


@dataclass
class Timeouts:
    """Seconds after which a section of the run that has not ended ends the job."""

    first: float = 1800.0
    """Up to the first step."""
    step: float = 300.0
    """Any part of a later step."""
    evaluation: float = 3600.0
    save: float = 1800.0


@dataclass
class Recovery:
    after: int = 3
    """So many updates in a row whose numbers are bad: back to the last checkpoint."""
    attempts: int = 3
    """Times to go back before the run ends."""
    spike: float | None = None
    """A loss so many robust standard deviations above the recent ones is bad; null: none is."""
    window: int = 128
    """Losses that this is measured by."""
    forgiven: int = 1000
    """Good updates in a row after which the attempts are counted anew."""
    verdict: str = "go_on"
    """What a bad verdict (a collapse, a loss spike, ...) leads to: `go_on`, which only tells it,
    `stop`, or `roll_back` to the checkpoint before it began."""


@dataclass
class Tracking:
    log_every: int = 10
    """Updates between two lines of metrics.jsonl."""
    progress: bool = True
    """Draw a progress bar where the output is a terminal."""
    wandb: str = "auto"
    """`auto` (where a key is configured), `online`, `offline` or `off`."""
    wandb_project: str = "selfsight"
    tensorboard: bool = False
    """Write event files for TensorBoard too, under runs/NAME/tensorboard."""
    report: bool = True
    """Write report.html during the run, with pictures of what the trunk sees."""


@dataclass
class Eval:
    every: int | None = None
    """Updates between two evaluations during the run; null takes a tenth of the run."""
    neighbours: int = 20
    temperature: float = 0.07
    batch_size: int = 256
    """Images per forward pass of the evaluation, on one device."""
    kind: str = "features"
    """What is evaluated: `features` of the trunk, or the `classifier` of method=supervised."""
    split: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    """Of a classifier: shares of the images to learn from, choose by and report on, where the data
    has no split; where it has one, the last share is learnt from too."""
    report: Any = None
    """What its result says beside its figures; set by launch/evaluate.py."""
    at_end: list[str] = field(default_factory=list)
    """Evaluations of launch/evaluate.py started when the run has ended, as jobs of their own."""
    at_checkpoints: list[str] = field(default_factory=list)
    """Those started for each trunk that checkpoint.keep_every exports."""


@dataclass
class Run:
    """Everything a run is, apart from what `_target_` nodes build."""

    name: str | None = None
    runs_dir: str = "runs"
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    deterministic: bool | None = None
    batch_size: int = 256
    images_per_device: int | None = None
    gpus: int = 1
    images: float | None = None
    epochs: float | None = None
    steps: Any = None
    clip_gradients: float | None = None
    clip_per_tensor: bool = False
    sync_batchnorm_group: int | None = None
    activation_checkpointing: Any = False
    strategy: str = "ddp"
    compile: bool = False
    compress_gradients: str | None = None
    resume: str = "strict"
    overrides: Any = None
    """The command line; written by the launch."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    loader: Loader = field(default_factory=Loader)
    pixels: Pixels = field(default_factory=Pixels)
    trunk: TrunkStart = field(default_factory=TrunkStart)
    cluster: Cluster = field(default_factory=Cluster)
    recovery: Recovery = field(default_factory=Recovery)
    timeouts: Timeouts = field(default_factory=Timeouts)
    tracking: Tracking = field(default_factory=Tracking)
    eval: Eval = field(default_factory=Eval)
    views: Any = None
    model: Any = None
    method: Any = None
    optim: Any = None
    schedule: Any = None
    data: Any = None


@dataclass
class Features:
    """How an evaluation extracts features, and keeps them."""

    folder: str | None = None
    """Where they are kept; null: `features/` in the run's folder."""
    batch_size: int = 64
    """Images of a forward pass."""
    workers: int | None = None
    """Threads that decode; null: up to eight."""
    half: bool = False
    """Keep them in fp16."""
    limit_train: int | None = None
    """At most so many images, evenly spaced."""
    limit_test: int | None = None


@dataclass
class EvaluationLoader:
    """What of `Loader` an evaluation needs."""

    max_pixels: int = 100_000_000
    max_bytes: int = 100_000_000
    max_side: int = 65_535
    truncated: str = "skip"
    min_decoded: float = 0.5


@dataclass
class Evaluation:
    """Everything a command of launch/evaluate.py is, apart from what `_target_` nodes build."""

    eval: Any = None
    run: str | None = None
    step: int | None = None
    trunk: str | None = None
    random_init: bool = False
    name: str | None = None
    runs_dir: str = "runs"
    out: str | None = None
    data_name: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    image_size: int | None = None
    resize: int | None = None
    wait: bool = True
    features: Features = field(default_factory=Features)
    loader: EvaluationLoader = field(default_factory=EvaluationLoader)
    cluster: Cluster = field(default_factory=Cluster)
    tracking: Tracking = field(default_factory=Tracking)
    data: Any = None
    batch_size: int = 64
    images_per_device: int | None = None
    gpus: int = 1
    resume: str = "anyway"
