"""Scores of answers; top-k accuracy is an `evaluate` metric that needs no network."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of images whose true class is among the k classes that the model scores highest."


class TopKAccuracy(evaluate.Metric):
    """Top-k accuracy that needs no network: `TopKAccuracy().compute(predictions=..., references=...)`.

    predictions: for each image the classes by falling score, at least k of them. references: the true classes.

    Example:
        >>> TopKAccuracy(keep_in_memory=True).compute(predictions=[[3, 1], [0, 2]], references=[3, 2], ks=[1, 2])
        {'top1': 0.5, 'top2': 1.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions: classes by falling score; references: true classes",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self, *, predictions: Sequence[Sequence[int]], references: Sequence[int], ks: Sequence[int] = (1, 5)
    ) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {f"top{k}": float(hits[:, :k].any(axis=1).mean()) for k in ks}


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Average precision of each class, the mean over those that are there in some image.

    A class's average precision is the mean, over the images that show it, of the precision among all images that score
    at least as high: that of scikit-learn, `average_precision_score`.

    Args:
        scores: [images, classes].
        truth: zeros and ones, [images, classes].

    Returns:
        0 where no image shows any class.

    Example:
        >>> mean_average_precision(np.array([[3.0], [2.0], [1.0]]), np.array([[1], [0], [1]])).__round__(3)
        0.833
    """
    found = []
    for score, here in zip(scores.T, truth.T > 0.5, strict=True):
        if here.any():
            order = np.argsort(-score, kind="stable")
            score, here = score[order], here[order]
            last = np.searchsorted(-score, -score, side="right")  # images that score at least as high
            found.append((np.cumsum(here)[last - 1] / last)[here].mean())
    return float(np.mean(found)) if found else 0.0


def micro_f1(answers: np.ndarray, truth: np.ndarray) -> float:
    """F1 of yes and no answers, all images and classes together; 0 where there is no yes at all.

    Args:
        answers: bool [images, classes].
        truth: bool [images, classes].
    """
    both, either = (answers & truth).sum(), answers.sum() + truth.sum()
    return float(2 * both / either) if either else 0.0


def r_squared(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labels' variance that is explained, the mean over outputs that vary (0 where none does).

    Args:
        outputs: [images, outputs].
        labels: [images, outputs].
    """
    errors, spread = np.square(outputs - labels).mean(0), labels.var(0)
    return float((1 - errors[spread > 0] / spread[spread > 0]).mean()) if (spread > 0).any() else 0.0
