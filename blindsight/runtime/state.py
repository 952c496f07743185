"""What the graphs of one compiled model share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from blindsight.attention.lowering import Lowering
from blindsight.passes.contract import PassList
from blindsight.profile import Profile
from blindsight.report import Verdict
from blindsight.runtime.attached import AttachedModels
from blindsight.runtime.forwards import Forwards


@dataclass
class BackendState:
    """The settings and the memory of one backend.

    Attributes:
        profile, strict, lowering: As the user gave them.
        forwards: What is known of the calls under way.
        models: Those that the backend is attached to.
        passes: The user's, around ours.
        verdicts: Of every attention call that was met, in the order of the graphs.
        check_unchanged: Complains, before a prompt runs sparse, of what was changed since.
    """

    profile: Profile
    strict: bool
    lowering: Lowering
    forwards: Forwards
    models: AttachedModels
    passes: PassList = field(default_factory=lambda: PassList(()))
    verdicts: list[Verdict] = field(default_factory=list)
    check_unchanged: Callable[[], None] = lambda: None

    def forget(self, graph: int) -> None:
        """Drop the verdicts of a graph that Dynamo does not get to run."""
        self.verdicts = [verdict for verdict in self.verdicts if verdict.graph != graph]
