"""What a script says at its end, for people."""

from __future__ import annotations

from typing import Any

from kdfast.training.keeper import SCORES
from kdfast.training.objective import Choice

# Scores of held-out images that are said, with their names and forms.
_HELD_OUT = (("eval_top1", "top1", ".2f"), ("eval_residual_share", "residual share", ".4f"))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as `1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def epoch_line(row: dict[str, Any], terms: list[str], epochs: int, left: str) -> str:
    """What is said of a finished epoch: a row of the summary, and the time left if it is known."""
    said = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {row['train_loss']:.4f}"]
    said += [f"{_of_training(name)} {row[f'train_{name}']:.4g}" for name in terms]
    shown = ((name, row.get(key), form) for key, name, form in _HELD_OUT)
    said += [f"{name} {value:{form}}" for name, value, form in shown if value is not None]
    said.append(f"{row['images_per_second']:.0f} images/s")
    return "  ".join(said + [f"{left} left"] * bool(left))


def _of_training(term: str) -> str:
    return f"training {term}" if term in SCORES else term


def comparison(
    teacher: str,
    student: str,
    taught: dict[str, float],
    baseline: dict[str, Any] | None,
    results: dict[str, Any],
    choice: Choice,
) -> str:
    """A table of top-1: teacher, student alone where it was trained, distilled student.

    And that student once the layers behind a matched one have learnt the labels, where they have.
    """
    rows = [("teacher", teacher, taught["top1"], None)]
    if baseline:
        rows.append(("alone", student, baseline["last"]["top1"], baseline["best"]["top1"]))
    name = "+".join(choice.methods) or "no method"
    rows.append((name, student, results["last"]["top1"], results["best"]["top1"]))
    if tail := results.get("classifier"):
        rows.append(("+ classifier", student, tail["last"]["top1"], tail["best"]["top1"]))
    lines = [f"{'':12} {'network':24} {'last':>6} {'best':>6}"]
    for kind, network, last, best in rows:
        shown = f"{best:6.2f}" if best is not None else f"{'':>6}"
        lines.append(f"{kind:12} {network:24} {last:6.2f} {shown}")
    if baseline:
        gain = rows[-1][2] - baseline["last"]["top1"]
        lines.append(f"{'gain':12} {'':24} {gain:+6.2f}")
    return "\n".join(lines)
