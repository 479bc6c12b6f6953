"""The model card that is saved beside a pruned model, filled from its report."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card_template.md")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(report: dict[str, Any], repo_id: str) -> ModelCard:
    """Fill the card's template.

    Args:
        report: what `BlockPruner.report()` returns.
        repo_id: the name under which the model will be loaded.
    """
    base = report["base_model"]
    evaluation = report.get("evaluation")
    name = repo_id.rpartition("/")[2]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if report.get("encoder") else "image-classification",
        tags=["block-sparse", "pruning", "hf_blockprune"],
        base_model=base if HUB_ID.fullmatch(base) else None,
        model_name=name if evaluation else None,
        eval_results=_eval_results(evaluation) if evaluation else None,
    )
    shape = report["config"]["block_shape"]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        **{key: value for key, value in report.items() if key not in ("config", "layers")},
        method=report["config"]["method"],
        auto_class=_auto_class(report),
        block_shape=f"{shape[0]}x{shape[1]}",
        model_name=name,
        repo_id=repo_id,
    )


def _auto_class(report: dict[str, Any]) -> str:
    """The class that loads the model."""
    if not report.get("encoder"):
        return "AutoModelForImageClassification"
    return "AutoBackbone" if report["model_class"].endswith("Backbone") else report["model_class"]


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    common = {
        "task_type": "image-classification",
        "dataset_type": re.sub(r"\W+", "-", evaluation["dataset"]),
        "dataset_name": evaluation["dataset"],
    }
    return [
        EvalResult(
            **common, metric_type="accuracy", metric_name=f"top-{k} accuracy", metric_value=evaluation[f"top{k}"]
        )
        for k in (1, 5)
    ]
