"""The scores of each task by name, as people read them."""

from ..model.tasks import MULTI, REGRESSION, SINGLE
from ..types import JsonDict

# What models are compared in; more of it is better.
MAIN = {SINGLE: "top1", MULTI: "mean_average_precision", REGRESSION: "r2"}
SCORES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_average_precision": "mean average precision",
    "f1": "F1",
    "r2": "R2",
    "mean_squared_error": "mean squared error",
}
SHARES = ("top1", "top5", "mean_average_precision", "f1")


def main_score(evaluation: JsonDict) -> str:
    """Key of the score that models are compared in, of what `Evaluation.to_dict` gives."""
    return next(key for key in MAIN.values() if key in evaluation)


def score_text(key: str, value: float, digits: int = 2) -> str:
    """A score as people read it: shares in per cent."""
    return f"{value:.{digits}%}" if key in SHARES else f"{value:.4g}"


def main_text(evaluation: JsonDict, digits: int = 2) -> str:
    """The main score with its name.

    Example:
        >>> main_text({"top1": 0.8125, "num_images": 16})
        'top-1 81.25%'
    """
    key = main_score(evaluation)
    return f"{SCORES[key]} {score_text(key, evaluation[key], digits)}"


def change_text(evaluation: JsonDict, *, digits: int = 2) -> str:
    """The change against the other model, with its interval where there is one."""
    share = main_score(evaluation) in SHARES
    form = f"{{:+.{digits}%}}" if share else "{:+.4f}"
    text = form.format(evaluation["delta"])
    if evaluation.get("interval") is None:
        return text
    low, high = evaluation["interval"]
    return f"{text} (95 % interval {form.format(low)} to {form.format(high)})"
