"""A run that starts from weights: loading them, and warming up a new head on a frozen trunk.

A new head on a trained trunk sends it random gradients at first, which can undo in a few hundred
updates what the trunk has learnt. So the trunk is frozen until the head has settled: until the mean
loss of a window of updates is hardly lower than that of the window before. While it is frozen its
gradients are dropped (no momentum, no weight decay), and BatchNorm normalises by its running
averages and leaves them alone. After that, and before, a guard looks at each evaluation: where
k-NN accuracy falls below what the weights had at the start, the run ends and says so. (Without
labels the guard has nothing to go by, and that is said.)
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from selfsight.distributed import collectives
from selfsight.distributed.preempt import Answer
from selfsight.methods.method import Method
from selfsight.recovery import GO_ON, Decision
from selfsight.sections import TrunkStart
from selfsight.weights.files import WeightsError
from selfsight.weights.heads import HeadReport, load_heads
from selfsight.weights.load import init_trunk

Say = Callable[[str], None]


class Start:
    """What `trunk.init` asks for. Without it, nothing of this does anything.

    Args:
        method: built, on any device, not yet laid out over ranks. Its trunks are loaded: the one
            that is trained, and the teacher's if there is one.
        settings: the section `trunk` of the run.
        pixels: mean and deviation that the run uses.
        say: takes lines for the console.

    Raises:
        ValueError: one sentence about the file, or a setting that cannot be.
    """

    def __init__(
        self,
        method: Method,
        settings: TrunkStart,
        pixels: tuple[list[float], list[float]],
        say: Say = print,
    ) -> None:
        if settings.head_warmup not in ("auto", True, False):
            raise ValueError(
                f"trunk.head_warmup={settings.head_warmup} is not one of auto, true, false"
            )
        if min(settings.warmup_window, settings.warmup_steps) < 1:
            raise ValueError("trunk.warmup_window and trunk.warmup_steps must be at least 1")
        self.settings, self.say = settings, say
        self.loaded = settings.init is not None
        self.trunk: nn.Module = getattr(method, "trainable_trunk", method.trunk)
        self.frozen = False
        self.left_at: int | None = None
        self.best: float | None = None  # k-NN at the start
        self.losses: list[float] = []  # since the trunk was frozen
        if settings.init is not None:
            self._load(method, settings.init, pixels)

    def _load(self, method: Method, path: str, pixels: tuple[list[float], list[float]]) -> None:
        trunks = [method.trunk]
        if self.trunk is not method.trunk:
            trunks.append(self.trunk)  # type: ignore[arg-type]
        for trunk in trunks:
            side = "student" if trunk is self.trunk and len(trunks) > 1 else "teacher"
            try:
                report, found = init_trunk(
                    trunk, path, allow_partial=self.settings.allow_partial, prefer=side
                )
            except WeightsError as error:
                text = str(error).replace("set allow_partial", "set trunk.allow_partial")
                raise WeightsError(f"trunk.init: {text}") from None
            name = f" ({side})" if len(trunks) > 1 else ""
            self.say(f"trunk.init={path}{name}: {report.text()}")
        if found.licence:
            self.say(f"trunk.init: {found.licence}")
        if (list(found.mean), list(found.std)) != tuple(map(list, pixels)):
            self.say(
                f"trunk.init: these weights expect pixels.mean={_list(found.mean)} and pixels.std="
                f"{_list(found.std)} ({found.pixels_from}), and the run has {_list(pixels[0])} and "
                f"{_list(pixels[1])}"
            )
        heads = HeadReport(0, 1, ("trunk.heads=false",))
        if self.settings.heads:
            heads = load_heads(method, found.others)
        self.say(f"trunk.init: {heads.text()}")
        wanted = self.settings.head_warmup
        self.frozen = not heads.whole if wanted == "auto" else bool(wanted)
        if self.frozen:
            self.say(
                "head warm-up: the trunk is frozen until the head has settled, for at most "
                f"{self.settings.warmup_steps} updates"
            )

    # ------------------------------------------------------------------------------ in the loop

    @property
    def suffix(self) -> str:
        """Of the names of figures measured before the first update."""
        return "_start" if self.loaded else "_random_init"

    @property
    def small(self) -> Mapping[str, Any]:
        """What travels in checkpoints."""
        return {"start": self} if self.loaded else {}

    def hold(self) -> None:
        """A frozen trunk runs as in evaluation. Call it after `method.train()`."""
        if self.frozen:
            self.trunk.eval()

    def drop_gradients(self) -> None:
        """A frozen trunk receives no update."""
        if self.frozen:
            for parameter in self.trunk.parameters():
                parameter.grad = None

    def observe(self, answer: Answer) -> None:
        """Take the loss of an update, the same on all ranks; lets the trunk go if it is time."""
        if not self.frozen or answer.bad:
            return
        self.losses.append(answer.loss)
        window = self.settings.warmup_window
        settled = False
        if len(self.losses) >= 2 * window and len(self.losses) % window == 0:
            now, before = (
                sum(part) / window
                for part in (self.losses[-window:], self.losses[-2 * window : -window])
            )
            settled = now > before * (1 - self.settings.warmup_gain)
        if settled or len(self.losses) >= self.settings.warmup_steps:
            self.frozen, self.left_at = False, answer.step
            self.trunk.train()
            why = "the head has settled" if settled else "the longest head warm-up is over"
            self.say(f"step {answer.step}: {why}; the trunk is trained from here on")

    def judge(self, figures: Mapping[str, float], step: int) -> Decision:
        """Take the figures of an evaluation; whether quality has fallen too far to go on."""
        if not self.loaded or self.settings.guard is None:
            return GO_ON
        knn = collectives.broadcast_json(figures.get("knn_top1"))  # all ranks go on, or none
        if knn is None:
            if self.best is None:
                self.say("trunk.guard: no labels, so a fall in quality would not be noticed")
                self.best = 0.0
            return GO_ON
        if self.best is None:
            self.best = knn
        if knn >= self.best * (1 - self.settings.guard):
            return GO_ON
        return Decision(
            "stop",
            f"k-NN fell from {self.best:.1f} % with the weights of trunk.init to {knn:.1f} % after "
            f"step {step}: the run ends; lower schedule.base_lr, set trunk.head_warmup=true, or "
            "trunk.guard=null to go on regardless",
            state="quality fell",
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "frozen": self.frozen,
            "left_at": self.left_at,
            "best": self.best,
            "losses": self.losses[-2 * self.settings.warmup_window :] if self.frozen else [],
            "count": len(self.losses),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.frozen, self.left_at, self.best = state["frozen"], state["left_at"], state["best"]
        kept = list(state["losses"])
        self.losses = [0.0] * (state["count"] - len(kept)) + kept
        self.hold()


def _list(values: Any) -> str:
    return "[" + ",".join(f"{value:g}" for value in values) + "]"
