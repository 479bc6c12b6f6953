"""The model card that is saved beside a pruned model, filled from its report."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES, MODEL_MAPPING_NAMES

from .scores import SCORES, change_text, main_score, main_text, score_text

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
        scores=_scores(evaluation) if evaluation else None,
        score_before=_score_before(report.get("recovery")),
    )


def _scores(evaluation: dict[str, Any]) -> str:
    """What was measured, of any task but one class an image, for which the template has words of its own."""
    if "top1" in evaluation:
        return ""
    found = ", ".join(f"{name} {score_text(key, evaluation[key])}" for key, name in SCORES.items() if key in evaluation)
    if "delta" not in evaluation:
        return f"{found}."
    key = main_score(evaluation)
    dense = score_text(key, evaluation[f"baseline_{key}"])
    return (
        f"{found}. The dense model has {SCORES[key]} {dense} on the same images: a change of {change_text(evaluation)}."
    )


def _score_before(recovery: dict[str, Any] | None) -> str | None:
    before = (recovery or {}).get("evaluation_before")
    return main_text(before, 1).replace("%", " %").replace("top-1 ", "top-1 was ") if before else None


def _auto_class(report: dict[str, Any]) -> str:
    """The class that loads the model."""
    if not report.get("encoder"):
        return "AutoModelForImageClassification"
    name = report["model_class"]
    if name in MODEL_FOR_BACKBONE_MAPPING_NAMES.values():
        return "AutoBackbone"
    return "AutoModel" if name in MODEL_MAPPING_NAMES.values() else name


def _eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    common = {
        "task_type": "image-classification",
        "dataset_type": re.sub(r"\W+", "-", evaluation["dataset"]),
        "dataset_name": evaluation["dataset"],
    }
    names = {"top1": "accuracy", "top5": "accuracy"}
    return [
        EvalResult(
            **common,
            metric_type=names.get(key, key),
            metric_name=f"{name} accuracy" if key in names else name,
            metric_value=evaluation[key],
        )
        for key, name in SCORES.items()
        if key in evaluation
    ]
