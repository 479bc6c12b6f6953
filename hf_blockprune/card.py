"""The model card that is saved beside a pruned model, filled from its report."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES, MODEL_MAPPING_NAMES
from yaml import YAMLError

from .checkpoint import REPORT_FILE
from .errors import CheckpointError
from .scores import SCORES, change_text, main_score, main_text, score_text

TEMPLATE = Path(__file__).with_name("card_template.md")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LOADED_AS = re.compile(r'\.from_pretrained\("([^"\n]+)"')
CARD_DIGEST = "card_sha256"  # the report's key


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
        **{key: value for key, value in report.items() if key not in ("config", "layers", "history")},
        method=report["config"]["method"],
        auto_class=_auto_class(report),
        block_shape=f"{shape[0]}x{shape[1]}",
        model_name=name,
        repo_id=repo_id,
        scores=_scores(evaluation, base) if evaluation else None,
        other_measurements=_others(report.get("history") or {}),
        dense_model=compared_with(evaluation, base) if evaluation else None,
        score_before=_score_before(report.get("recovery")),
    )


def card_digest(text: str) -> str:
    """A digest of a card's text, the same under every name; the report keeps it, so that edits are seen.

    By the template alone cards that another version of the package made would look edited.
    """
    name = _name_in(text) or ""
    plain = text.replace(f'"{name}"', '""').replace(f"\n# {name.rpartition('/')[2]}\n", "\n# \n")
    return sha256(plain.encode()).hexdigest()


def _name_in(text: str) -> str | None:
    """The name under which a card loads its model."""
    found = LOADED_AS.search(text)
    return found and found[1]


def updated_card(
    text: str, before: dict[str, Any], after: dict[str, Any], repo_id: str | None = None
) -> tuple[str, str] | None:
    """A card's file for another report, and its digest; None where somebody edited its text or its results.

    Metadata that somebody added, such as a license, stay.

    Args:
        text: of the file.
        before: the report that it was made of.
        after: the report to make it of.
        repo_id: the name to make it under, by default the same.

    Raises:
        CheckpointError: a report lacks what cards are made of.
    """
    name = _name_in(text)
    if name is None or not text.startswith("---"):
        return None
    try:
        found: Any = ModelCard(text)
        old: Any = model_card(before, name)
        new: Any = model_card(after, repo_id or name)
    except (ValueError, YAMLError):  # metadata of another form
        return None
    except (KeyError, TypeError, AttributeError, TemplateError) as error:
        raise CheckpointError(f"{REPORT_FILE}: no card can be made of it ({error!r})") from error
    if card_digest(found.text) != (before.get(CARD_DIGEST) or card_digest(old.text)):
        return None
    metadata, generated = found.data.to_dict(), old.data.to_dict()
    if metadata.get("model-index") != generated.get("model-index"):
        return None
    if metadata != generated:
        found.data.model_name, found.data.eval_results = new.data.model_name, new.data.eval_results
        new.data = found.data
    return str(new), card_digest(new.text)


def _scores(evaluation: dict[str, Any], base: str) -> str:
    """What was measured, of any task but one class an image, for which the template has words of its own."""
    if "top1" in evaluation:
        return ""
    found = ", ".join(f"{name} {score_text(key, evaluation[key])}" for key, name in SCORES.items() if key in evaluation)
    if "delta" not in evaluation:
        return f"{found}."
    key = main_score(evaluation)
    dense = score_text(key, evaluation[f"baseline_{key}"])
    return (
        f"{found}. {compared_with(evaluation, base)} has {SCORES[key]} {dense} on the same images: a change of "
        f"{change_text(evaluation)}."
    )


def compared_with(evaluation: dict[str, Any], base: str) -> str:
    """The model that a measurement compares with, by its name where that is not the one that was pruned."""
    other = evaluation.get("against")
    return "The dense model" if other in (None, base) else f"The dense model {other}"


def _others(history: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Measurements beside the newest: of accuracies and embeddings the score in words, of latencies as they are."""
    scored = [{**each, "words": _score_words(each)} for each in history.get("evaluation") or []]
    alike = [{**each, "words": f"cosine similarity {each['cosine']:.4f}"} for each in history.get("fidelity") or []]
    return {"scores": [*scored, *alike], "latencies": history.get("latency") or []}


def _score_words(evaluation: dict[str, Any]) -> str:
    text = main_text(evaluation)
    return f"{text}, change {change_text(evaluation)}" if "delta" in evaluation else text


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
