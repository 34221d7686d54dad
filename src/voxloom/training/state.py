"""How far a queue is, in a few whole numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.schedules import EpochSchedule
from ..core.sizes import as_int
from ..errors import QueueError
from .patch_worker import SKIPPED_BEFORE, SkippedSubject

__all__ = ["QueueState"]


@dataclass(frozen=True)
class QueueState:
    """Where a queue can be resumed."""

    seed: int
    epoch: int
    position: int
    """Patches of the epoch that have been yielded."""
    fingerprint: int = 0
    """Tells the schedule of the epoch from others; 0 between two epochs, where any will do."""
    skipped: tuple[SkippedSubject, ...] = ()

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "QueueState":
        """Read what `to_dict` has written.

        Raises:
            QueueError: if it is something else.
        """
        try:
            seed = as_int(state["seed"], "seed", -(2**63))
            epoch, position = (as_int(state[name], name, 0) for name in ("epoch", "position"))
            fingerprint = int(state["schedule"]) if position else 0
            skipped = tuple(
                SkippedSubject(epoch, int(place), int(subject), int(first), SKIPPED_BEFORE)
                for place, subject, first in state.get("skipped", ())
            )
        except (KeyError, TypeError, ValueError) as error:
            raise QueueError(f"{state!r} is no state of a queue: it must be what state_dict returned") from error
        return cls(seed, epoch, position, fingerprint, skipped)

    def skipped_of(self, schedule: EpochSchedule | None) -> tuple[SkippedSubject, ...]:
        """Give the subjects that were skipped, as far as they are a schedule's own: the state may be that of another rank."""
        if schedule is None:
            return self.skipped
        places = dict(enumerate(schedule.subjects))
        return tuple(skip for skip in self.skipped if places.get(skip.place) == skip.subject)

    def to_dict(self) -> dict[str, Any]:
        """Give it in plain types."""
        state: dict[str, Any] = {"seed": self.seed, "epoch": self.epoch, "position": self.position}
        if self.position:
            skipped = sorted((skip.place, skip.subject, skip.first) for skip in self.skipped)
            state |= {"schedule": self.fingerprint, "skipped": skipped}
        return state

    def is_of(self, schedule: EpochSchedule) -> bool:
        """Say whether it was taken of a schedule, or can be resumed with any."""
        return not self.position or (schedule.fingerprint == self.fingerprint and self.position < len(schedule))

    def other_order(self, subject_sampler: Any) -> QueueError:
        """Make the error for an epoch that has another order than when the state was taken."""
        hint = "the subjects, their order or numbers of patches, max_length, shuffle_patches or world_size differ"
        if subject_sampler is not None:
            hint += "; a DistributedSampler needs the set_epoch that it had, and each of its ranks a state of its own"
        return QueueError(
            f"epoch {self.epoch} cannot be resumed at patch {self.position}, because it has another order than when the state"
            f" was taken: {hint}"
        )
