"""The model card that is saved beside a pruned model, filled from its report."""

import re
from hashlib import sha256
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES, MODEL_MAPPING_NAMES
from yaml import YAMLError

from ..errors import CheckpointError
from ..evaluate.scores import SCORES, change_text, main_score, main_text, score_text
from ..report.measured import History, MeasuredScores
from ..report.values import RecoveryReport, Report
from ..types import JsonDict
from .folder import REPORT_FILE

TEMPLATE = Path(__file__).with_name("card_template.md")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LOADED_AS = re.compile(r'\.from_pretrained\("([^"\n]+)"')
NOT_SHOWN = ("config", "layers", "history")  # keys of the report that the template has no word of


def model_card(report: Report, repo_id: str) -> ModelCard:
    """Fill the card's template.

    Args:
        report: of the model, with its sizes on disk.
        repo_id: the name under which the model will be loaded.
    """
    base, evaluation = report.base_model, report.measured.evaluation
    name = repo_id.rpartition("/")[2]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if report.encoder else "image-classification",
        tags=["block-sparse", "pruning", "hf_blockprune"],
        base_model=base if HUB_ID.fullmatch(base) else None,
        model_name=name if evaluation else None,
        eval_results=_eval_results(evaluation) if evaluation else None,
    )
    shape = report.config["block_shape"]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        **{key: value for key, value in report.to_dict().items() if key not in NOT_SHOWN},
        method=report.config["method"],
        auto_class=_auto_class(report),
        block_shape=f"{shape[0]}x{shape[1]}",
        model_name=name,
        repo_id=repo_id,
        scores=_scores(evaluation, base) if evaluation else None,
        other_measurements=_others(report.measured.history or History()),
        dense_model=compared_with(evaluation, base) if evaluation else None,
        score_before=_score_before(report.recovery),
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


def updated_card(text: str, before: Report, after: Report, repo_id: str | None = None) -> tuple[str, str] | None:
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
        found = ModelCard(text)
        old = model_card(before, name)
        new = model_card(after, repo_id or name)
    except (ValueError, YAMLError):  # metadata of another form
        return None
    except (KeyError, TypeError, AttributeError, TemplateError) as error:
        raise CheckpointError(f"{REPORT_FILE}: no card can be made of it ({error!r})") from error
    if card_digest(found.text) != (before.card_sha256 or card_digest(old.text)):
        return None
    metadata, generated = found.data.to_dict(), old.data.to_dict()
    if metadata.get("model-index") != generated.get("model-index"):
        return None
    if metadata != generated:
        for key in ("model_name", "eval_results"):
            found.data[key] = new.data[key]
        new.data = found.data
    return str(new), card_digest(new.text)


def _scores(evaluation: MeasuredScores, base: str) -> str:
    """What was measured, of any task but one class an image, for which the template has words of its own."""
    values = evaluation.to_dict()
    if evaluation.top1 is not None:
        return ""
    found = ", ".join(f"{name} {score_text(key, values[key])}" for key, name in SCORES.items() if key in values)
    if not evaluation.compares:
        return f"{found}."
    key = main_score(values)
    dense = score_text(key, values[f"baseline_{key}"])
    return (
        f"{found}. {compared_with(evaluation, base)} has {SCORES[key]} {dense} on the same images: a change of "
        f"{change_text(values)}."
    )


def compared_with(evaluation: MeasuredScores, base: str) -> str:
    """The model that a measurement compares with, by its name where that is not the one that was pruned."""
    other = evaluation.against
    return "The dense model" if other in (None, base) else f"The dense model {other}"


def _others(history: History) -> dict[str, list[JsonDict]]:
    """Measurements beside the newest: of accuracies and embeddings the score in words, of latencies as they are."""
    scored = [{**each.to_dict(), "words": _score_words(each)} for each in history.evaluation or []]
    alike = [{**each.to_dict(), "words": f"cosine similarity {each.cosine:.4f}"} for each in history.fidelity or []]
    return {"scores": [*scored, *alike], "latencies": [each.to_dict() for each in history.latency or []]}


def _score_words(evaluation: MeasuredScores) -> str:
    values = evaluation.to_dict()
    text = main_text(values)
    return f"{text}, change {change_text(values)}" if evaluation.compares else text


def _score_before(recovery: RecoveryReport | None) -> str | None:
    before = None if recovery is None else recovery.evaluation_before
    return main_text(before.to_dict(), 1).replace("%", " %").replace("top-1 ", "top-1 was ") if before else None


def _auto_class(report: Report) -> str:
    """The class that loads the model."""
    if not report.encoder:
        return "AutoModelForImageClassification"
    name = report.model_class or "AutoModel"
    if name in MODEL_FOR_BACKBONE_MAPPING_NAMES.values():
        return "AutoBackbone"
    return "AutoModel" if name in MODEL_MAPPING_NAMES.values() else name


def _eval_results(evaluation: MeasuredScores) -> list[EvalResult]:
    values, dataset = evaluation.to_dict(), evaluation.dataset or "unknown"
    names = {"top1": "accuracy", "top5": "accuracy"}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=re.sub(r"\W+", "-", dataset),
            dataset_name=dataset,
            metric_type=names.get(key, key),
            metric_name=f"{name} accuracy" if key in names else name,
            metric_value=values[key],
        )
        for key, name in SCORES.items()
        if key in values
    ]
