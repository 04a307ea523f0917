"""The contract of an evaluation: one file beside this one and one yaml in `conf/eval`.

An `Evaluator` is asked once, for one trunk and one labelled set, and answers with an `Answer`. What
it needs of images it takes from the bench (`selfsight.evals.bench`): features are extracted once
for all evaluators of a command, and kept.

A `TrainingEvaluator` trains the trunk itself. It describes runs of the loop, which the command
starts; nothing here knows the loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from selfsight.evals.intervals import Figure

if TYPE_CHECKING:
    from selfsight.evals.bench import Bench
    from selfsight.evals.subject import Subject


@dataclass(frozen=True)
class Answer:
    """What an evaluation found."""

    main: str
    """The figure that tables show."""
    figures: dict[str, Figure]
    protocol: str
    """How it was measured, in words: enough to tell whether two numbers may be compared."""
    details: dict[str, Any] = field(default_factory=dict)
    """More to keep: chosen hyperparameters, per-class accuracy, ... Plain values."""


class Evaluator(ABC):
    """Base of evaluations of features. Constructors take plain arguments, those of the yaml."""

    @abstractmethod
    def layers(self, subject: "Subject") -> Sequence[str]:
        """Names of the vectors it needs of each image, as `selfsight.trunks.vectors` has them."""

    @abstractmethod
    def evaluate(self, bench: "Bench") -> Answer:
        """Measure. The same on all ranks.

        Raises:
            ValueError: the data does not allow it; one sentence.
        """


@dataclass(frozen=True)
class TrainingRun:
    """One run of the loop that an evaluation asks for."""

    suffix: str
    """Added to the evaluation's name to make the run's."""
    overrides: list[str]
    """Of `conf/pretrain.yaml`, as on the command line."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Nodes set after that, by dotted key."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What its result is told by beside its figures, e.g. {"seed": 0, "images": "10 %"}."""


class TrainingEvaluator(ABC):
    """Base of evaluations that train: fine-tuning, probes on random crops."""

    @abstractmethod
    def runs(self, seed: int) -> list[TrainingRun]:
        """The runs to make, from the seed of the command. Reads no image."""
