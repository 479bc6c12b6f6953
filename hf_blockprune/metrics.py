"""Top-k accuracy as an `evaluate` metric that needs no network."""

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

    def _compute(self, *, predictions, references, ks=(1, 5)) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {f"top{k}": float(hits[:, :k].any(axis=1).mean()) for k in ks}
