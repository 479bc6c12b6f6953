"""Encoders without a head, and the vision parts of CLIP and SigLIP, from pruning to what loads again."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTModel,
    Dinov2Backbone,
    Dinov2Model,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinModel,
    ViTImageProcessor,
    ViTModel,
    XCLIPVisionConfig,
    XCLIPVisionModel,
)

from hf_blockprune import BlockPruneConfig, BlockPruner, ConfigError, ModelError, RecoveryConfig
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.evaluate.fidelity import Embeddings, compare
from hf_blockprune.export.forms import export_checkpoint
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.model.outputs import answers, classifies
from hf_blockprune.model.structure import find_residual_stream, find_transformer_layers
from hf_blockprune.reorder.stream import permute_stream
from tests.commands import run
from tests.conftest import NUM_LABELS, tiny_config, tiny_settings

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
CONFIG = BlockPruneConfig(
    block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.75}, calibration={"samples": 24, "batch_size": 8}
)
TOWER = {key: value for key, value in tiny_settings().items() if key != "id2label"}
NAMES = tiny_settings()["id2label"]


def clip_vision():
    return CLIPVisionConfig(**TOWER, projection_dim=40)


CLASSIFIERS = {
    "clip": lambda: CLIPForImageClassification(CLIPConfig(vision_config=clip_vision().to_dict(), id2label=NAMES)),
    "siglip": lambda: SiglipForImageClassification(
        SiglipConfig(vision_config=SiglipVisionConfig(**TOWER).to_dict(), id2label=NAMES)
    ),
}
ENCODERS = {
    "vit": lambda: ViTModel(tiny_config("vit")),
    "vit without pooler": lambda: ViTModel(tiny_config("vit"), add_pooling_layer=False),
    "deit": lambda: DeiTModel(tiny_config("deit")),
    "dinov2": lambda: Dinov2Model(tiny_config("dinov2")),
    "dinov2 backbone": lambda: Dinov2Backbone(tiny_config("dinov2", out_features=["stage1", "stage2"])),
    "swin": lambda: SwinModel(tiny_config("swin")),
    "ijepa": lambda: IJepaModel(IJepaConfig(**TOWER)),
    "clip vision": lambda: CLIPVisionModel(clip_vision()),
    "clip projection": lambda: CLIPVisionModelWithProjection(clip_vision()),
    "siglip vision": lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)),
}


def made(kind):
    torch.manual_seed(0)
    model = {**CLASSIFIERS, **ENCODERS}[kind]().eval()
    for name, parameter in model.named_parameters():  # fresh ones have too many zeros and ones to show a mistake
        torch.nn.init.normal_(parameter, std=0.2)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


@torch.no_grad()
def answered(model):
    return answers(model, PIXELS)


def relative_error(have, wanted):
    return float((have - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("kind", [*CLASSIFIERS, *ENCODERS])
def test_from_a_folder_to_a_folder(kind, images, processor, tmp_path):
    dense = made(kind)
    dense.save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(tmp_path / "dense", CONFIG.replace(recovery=RecoveryConfig(epochs=2)))
    assert type(pruner.model) is type(dense)
    wanted = answered(dense)
    pruner.prune(images)
    plain = BlockPruner(made(kind), processor, CONFIG.replace(method="magnitude", refit=False))
    plain.prune()
    assert relative_error(answered(pruner.model), wanted) < relative_error(answered(plain.model), wanted)
    pruner.recover(images)
    seen = pruner.report()["recovery"]
    assert seen["divergence"][seen["kept"]] == min(seen["divergence"].values())
    pruner.save_pretrained(tmp_path / "pruned")
    again = BlockPruner.from_pretrained(tmp_path / "pruned")
    assert type(again.model) is type(dense)
    torch.testing.assert_close(answered(again.model), answered(pruner.model), atol=1e-5, rtol=1e-5)
    assert len(dict(block_sparse_layers(again.model))) == len(pruner.report()["layers"])
    stored = inspect_checkpoint(tmp_path / "pruned")
    assert stored["flops_ratio"] == pytest.approx(pruner.report()["flops_ratio"])


@pytest.mark.parametrize("kind", [kind for kind in (*CLASSIFIERS, *ENCODERS) if kind != "ijepa"])  # which is unknown
def test_features_that_change_places_leave_answers_alone(kind, images, processor):
    model = made(kind)
    wanted = answered(model)
    whole = CONFIG.replace(budget={"metric": "density", "ratio": 1.0}, refit=False)
    pruner = BlockPruner(model, processor, whole)
    pruner.prune(images)
    torch.testing.assert_close(answered(pruner.model), wanted, atol=1e-4, rtol=1e-4)
    assert pruner.report()["permutation"]["saliency_kept_after"] == pytest.approx(1)
    assert (pruner.report()["permutation"]["residual_order"] is not None) == (kind in CLASSIFIERS)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_towers_have_known_layers_and_one_stream(kind):
    model = made(kind)
    wanted = answered(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = find_transformer_layers(model, linears)
    assert [layer.heads for layer in layers] == [3, 3]
    permute_stream(model, find_residual_stream(model), torch.randperm(48, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(answered(model), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_latency_budgets_know_the_towers(kind, images, processor):
    budget = {"metric": "latency", "ratio": 0.9, "device": "systolic-32"}
    pruner = BlockPruner(made(kind), processor, CONFIG.replace(budget=budget))
    pruner.prune(images)
    (account,) = pruner.report()["budgets"]
    assert account["reached"] <= account["asked"] < account["dense"]


def test_an_answer_is_what_users_take_for_the_embedding():
    @torch.no_grad()
    def output(kind):
        return made(kind)(pixel_values=PIXELS)

    for kind, wanted in {
        "vit": output("vit").pooler_output,
        "vit without pooler": output("vit without pooler").last_hidden_state[:, 0],
        "ijepa": output("ijepa").last_hidden_state.mean(1),
        "clip projection": output("clip projection").image_embeds,
        "clip": output("clip").logits,
        "dinov2 backbone": torch.cat([m.mean((2, 3)) for m in output("dinov2 backbone").feature_maps], dim=1),
    }.items():
        torch.testing.assert_close(answered(made(kind)), wanted)
    assert classifies(made("clip"))
    assert not classifies(made("clip projection"))
    assert answered(made("clip")).shape == (3, NUM_LABELS)


def test_fidelity_against_loops():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 9, 5)).astype(np.float32)
    found = compare(Embeddings(np.arange(9), a, []), Embeddings(np.arange(9), b, []))
    cosines = [float(x @ y / np.sqrt((x @ x) * (y @ y))) for x, y in zip(a, b, strict=True)]
    error = sum(float((x - y) @ (x - y)) for x, y in zip(a, b, strict=True))
    assert found.cosine == pytest.approx(sum(cosines) / 9, rel=1e-5)
    assert found.least_cosine == pytest.approx(min(cosines), rel=1e-5)
    assert found.relative_squared_error == pytest.approx(error / (9 * b.var(0).sum()), rel=1e-5)
    with pytest.raises(ModelError, match="5 values cannot be compared with those of 4"):
        compare(Embeddings(np.arange(9), a, []), Embeddings(np.arange(9), b[:, :4], []))


def test_an_encoder_is_evaluated_against_another_one(images, processor, tmp_path):
    dense = BlockPruner(made("dinov2"), processor, name="dense")
    same = dense.evaluate(images, against=dense)
    assert same.cosine == pytest.approx(1)
    assert same.relative_squared_error == 0
    pruner = BlockPruner(made("dinov2"), processor, CONFIG, name="tiny")
    with pytest.raises(ModelError, match="is an encoder, which has no accuracy"):
        pruner.evaluate(images)
    pruner.prune(images)
    found = pruner.evaluate(images, against=dense.embeddings(images))
    assert 0 < found.relative_squared_error < 1
    assert pruner.report()["fidelity"]["cosine"] == found.cosine
    pruner.save_pretrained(tmp_path / "pruned")
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert f"On {found.num_images} images of {pruner.report()['fidelity']['dataset']}, against the dense model" in card
    assert pruner.report()["fidelity"]["dataset"]
    assert f"cosine similarity {found.cosine:.4f}" in card
    assert "AutoModel.from_pretrained(" in card
    assert "AutoModelForImageClassification" not in card
    loaded = AutoModel.from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(answered(loaded), answered(pruner.model), atol=1e-5, rtol=1e-5)


def test_labels_of_a_data_set_do_not_matter_to_an_encoder(images, processor):
    """Its config has two classes by default, and the data set's labels are of more."""
    model = made("clip vision")
    assert model.config.num_labels == 2
    BlockPruner(model, processor, CONFIG).prune(images)
    assert next(block_sparse_layers(model), None)


def test_what_needs_a_classifier_is_refused(images, processor):
    with pytest.raises(ConfigError, match="'taylor' needs the loss of a classifier"):
        BlockPruner(made("vit"), processor, CONFIG.replace(method="taylor")).prune(images)
    pruner = BlockPruner(made("vit"), processor, CONFIG)
    pruner.prune(images)
    with pytest.raises(ModelError, match="training needs a classifier"):
        pruner.finetune(images)


def video(frames=8):
    return XCLIPVisionModel(XCLIPVisionConfig(**TOWER, num_frames=frames)).eval()


@pytest.mark.parametrize("ask", ["prune", "evaluate", "embeddings", "finetune"])
def test_models_of_more_than_one_image_are_refused_in_one_line(ask, images, processor):
    with pytest.raises(ModelError, match="XCLIPVisionModel: does not answer images of 32x32") as caught:
        getattr(BlockPruner(video(), processor, CONFIG), ask)(images)
    assert "\n" not in str(caught.value)


def test_embeddings_of_another_size_are_refused_by_the_processor(images):
    wide = ViTImageProcessor(size={"height": 64, "width": 64})
    with pytest.raises(ModelError, match="brings pictures to 64x64"):
        BlockPruner(made("vit"), wide).embeddings(images)


def test_a_model_of_images_and_texts_says_how_to_prune_its_vision_part(images, processor, tmp_path):
    text = CLIPTextConfig(**{k: v for k, v in TOWER.items() if k not in ("image_size", "patch_size")}, vocab_size=64)
    towers = {"vision_config": clip_vision().to_dict(), "text_config": text.to_dict()}
    whole = CLIPModel(CLIPConfig(**towers, projection_dim=40)).eval()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    with pytest.raises(ModelError, match="only models that take pixel_values and nothing else"):
        BlockPruner(whole, processor, CONFIG).prune(images)
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    whole.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    with pytest.raises(ModelError, match=r"pass model_class=transformers\.CLIPVisionModelWithProjection"):
        BlockPruner.from_pretrained(tmp_path / "clip")
    pruner = BlockPruner.from_pretrained(tmp_path / "clip", CONFIG, model_class=CLIPVisionModelWithProjection)
    wanted = whole.get_image_features(pixel_values=PIXELS)
    wanted = wanted if torch.is_tensor(wanted) else wanted.pooler_output
    torch.testing.assert_close(answered(pruner.model), wanted)
    pruner.prune(images)
    pruner.save_pretrained(tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["architectures"] == [
        "CLIPVisionModelWithProjection"
    ]


def test_the_command_measures_an_encoder_and_says_so(images, processor, tmp_path):
    for name in ("dense", "other"):
        pruner = BlockPruner(made("clip projection"), processor)
        pruner.model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    done = run("evaluate", tmp_path / "dense", "--dataset", images, "--against", tmp_path / "other")
    assert (done.exit_code, done.exception) == (0, None), done.output
    assert "cosine" in done.stdout


@pytest.mark.parametrize("form", ["dense", "torch-export"])
def test_encoders_are_exported_and_measured(form, images, processor, tmp_path):
    pruner = BlockPruner(made("clip projection"), processor, CONFIG)
    pruner.prune(images)
    pruner.save_pretrained(tmp_path / "pruned")
    done = export_checkpoint(tmp_path / "pruned", tmp_path / "out", form)
    assert done["max_difference"] < 1e-3
    measured = pruner.benchmark(seconds=0.05)
    assert measured["rows"][0]["latency_ms"] > 0


WITHOUT_BIASES = {
    "key of dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**TOWER)),
    "key of a dinov3 backbone": lambda: DINOv3ViTBackbone(DINOv3ViTConfig(**TOWER, out_features=["stage1", "stage2"])),
    "all of aimv2": lambda: Aimv2VisionModel(Aimv2VisionConfig(**TOWER)),
}


@pytest.mark.parametrize("kind", WITHOUT_BIASES)
def test_biases_that_refitting_gave_are_part_of_a_dense_export(kind, images, processor, tmp_path):
    """Keys that are turned by their place feel a bias, which a softmax alone would not."""
    torch.manual_seed(0)
    dense = WITHOUT_BIASES[kind]().eval()
    pruner = BlockPruner(dense, processor, CONFIG)
    pruner.prune(images)
    biased = [
        name for name, module in block_sparse_layers(pruner.model) if "k_proj" in name and module.bias is not None
    ]
    assert biased
    pruner.save_pretrained(tmp_path / "pruned")
    export_checkpoint(tmp_path / "pruned", tmp_path / "out", "dense")
    stock = type(dense).from_pretrained(tmp_path / "out")
    assert type(stock.get_submodule(biased[0])) is torch.nn.Linear
    torch.testing.assert_close(answered(stock), answered(pruner.model), atol=1e-5, rtol=1e-5)
    assert "pipeline_tag: image-feature-extraction" in (tmp_path / "out" / "README.md").read_text()
