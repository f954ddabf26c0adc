"""Backends, and the choice between them: the first without an objection.

An explicit ``backend=`` is never replaced by another, and no exception is swallowed.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosscut.backends.blocks import BlocksBackend
from crosscut.backends.protocol import DECLARED, WHOLE, Backend, DistillationProblem, HeadProblem
from crosscut.backends.triton import TritonBackend

_BACKENDS: tuple[Backend, ...] = (TritonBackend(), BlocksBackend())  # in order of preference
NAMES: tuple[str, ...] = tuple(backend.name for backend in _BACKENDS)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Which backend would run a problem, and why not the others. ``print`` it.

    Attributes:
        backend: the name of the backend chosen, or None if none can serve.
        verdicts: each backend's objection, in order of preference; None where it can serve.
    """

    backend: str | None
    verdicts: dict[str, str | None]

    def __str__(self) -> str:
        width = max(map(len, self.verdicts))
        return "\n".join(
            f"{'>' if name == self.backend else ' '} {name:<{width}}  {reason or 'can serve this'}"
            for name, reason in self.verdicts.items()
        )


def explain(problem: HeadProblem) -> Explanation:
    """Ask every backend."""
    verdicts = {
        backend.name: _not_served(backend, problem) or backend.unsupported_reason(problem)
        for backend in _BACKENDS
    }
    return _explanation(problem.options.backend, verdicts)


def choose(problem: HeadProblem) -> Backend:
    """The first backend without an objection, or the one that ``options.backend`` names.

    Raises:
        ValueError: no backend, or not the one named, can serve the problem.
    """
    return _chosen(problem.options.backend, explain(problem))


def explain_distillation(problem: DistillationProblem) -> Explanation:
    """As ``explain``, by the options of the student."""
    verdicts = {
        backend.name: backend.unsupported_distillation_reason(problem) for backend in _BACKENDS
    }
    return _explanation(problem.student.options.backend, verdicts)


def choose_for_distillation(problem: DistillationProblem) -> Backend:
    """As ``choose``, by the options of the student.

    Raises:
        ValueError: no backend, or not the one named, can serve the problem.
    """
    return _chosen(problem.student.options.backend, explain_distillation(problem))


def _not_served(backend: Backend, problem: HeadProblem) -> str | None:
    """What of a problem is none of what the backend declares."""
    if problem.shard != WHOLE and not backend.shards:
        return "serves no shard of a vocabulary"
    lacking = [
        name
        for name, statistic in DECLARED.items()
        if name not in backend.computes and statistic.asked(problem)
    ]
    return f"does not compute {' and '.join(lacking)}" if lacking else None


def _explanation(wanted: str, verdicts: dict[str, str | None]) -> Explanation:
    check_name(wanted)
    names = NAMES if wanted == "auto" else (wanted,)
    chosen = next((name for name in names if verdicts[name] is None), None)
    return Explanation(backend=chosen, verdicts=verdicts)


def _chosen(wanted: str, explanation: Explanation) -> Backend:
    if explanation.backend is None:
        raise ValueError(
            f"backend={wanted!r} cannot serve this call: "
            + "; ".join(
                f"{name}: {reason}"
                for name, reason in explanation.verdicts.items()
                if wanted in ("auto", name)
            )
        )
    return _BACKENDS[NAMES.index(explanation.backend)]


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or a backend's name."""
    if name != "auto" and name not in NAMES:
        choices = ", ".join(map(repr, ("auto", *NAMES)))
        raise ValueError(f"backend must be one of {choices}, got {name!r}")
