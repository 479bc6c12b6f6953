"""Models in which tokens merge: run, loaded, saved, exported, trained, and turned whole again."""

import copy
import io
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    pipeline,
)

from hf_blockprune import BlockSparseFormatError
from hf_blockprune.hub.blockprune_flops import count_flops
from hf_blockprune.hub.blockprune_halves import attend, has_halves, think
from hf_blockprune.hub.blockprune_merging import Groups, averaged, merge, restore
from hf_blockprune.hub.blockprune_tokens import (
    TokenSchedule,
    UnmergeableError,
    forget_schedule,
    mergeable_layers,
    passing_tokens,
    schedule_of,
    set_schedule,
    tokens_read,
    unmerged,
)
from tests.conftest import tiny_model, tiny_settings
from tests.hub.saved_models import PIXELS, answer, answers_of, assert_same, config_of, sparse_model

# Model, config, tokens before the patches.
KINDS = {
    "vit": (ViTForImageClassification, ViTConfig, 1),
    "deit": (DeiTForImageClassification, DeiTConfig, 2),
    "distilled": (DeiTForImageClassificationWithTeacher, DeiTConfig, 2),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, 1),
    "registers": (Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig, 5),
    "vit_msn": (ViTMSNForImageClassification, ViTMSNConfig, 1),
    "clip": (CLIPVisionModel, CLIPVisionConfig, 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, 0),
    "ijepa": (IJepaModel, IJepaConfig, 0),
}
PATCHES = 64
SCHEDULE = TokenSchedule((20, 0, 15), PATCHES)


def made(kind, **settings):
    """A dense model of three layers and 64 patches, of weights large enough that everything matters."""
    model_class, config_class, _ = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**tiny_settings(), "patch_size": 4, "num_hidden_layers": 3, **settings})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def linears(model):
    """Names of the Linears of its layers."""
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n.startswith(f"{name}.")]


def merging(kind, schedule=SCHEDULE, **settings):
    model = made(kind, **settings)
    set_schedule(model, schedule, linears(model))
    return model


def sparse(kind="vit", schedule=SCHEDULE, **settings):
    """One with block-sparse layers."""
    return sparse_model(merging(kind, schedule, **settings))


@torch.no_grad()
def by_hand(kind, schedule=SCHEDULE, pixels=PIXELS):
    """What a merging model must give: attention in loops over heads, and groups of patches as plain sets.

    All tokens of the whole image are kept, and those of a group share one state; attention over them all, each with a
    weight of its own, is attention over groups with log(size) added. So nothing here knows of merging's shapes.
    """
    model = made(kind).double()
    layers = list(next(module for module in model.modules() if isinstance(module, nn.ModuleList)))
    prefix, groups = KINDS[kind][2], None

    def layer_forward(layer, number):
        def forward(states, *args, **kwargs):
            nonlocal groups
            groups = groups or [[[i] for i in range(states.shape[1] - prefix)] for _ in states]
            states, read = attend(layer, states, None)
            leave = schedule.leave[number]
            if leave:
                groups = [_merged(own, read[i, prefix:], leave) for i, own in enumerate(groups)]
                states = states.clone()
                for i, own in enumerate(groups):
                    for group in own:
                        states[i, [prefix + p for p in group]] = states[i, [prefix + p for p in group]].mean(0)
            return think(layer, states)

        return forward

    for number, layer in enumerate(layers):
        layer.forward = layer_forward(layer, number)
    output = model(pixel_values=pixels.double())
    return (output["logits"] if "logits" in output else output["last_hidden_state"]).float()


def _merged(groups, read, leave):
    """Groups of patches after some went into others: in the order of the model's tokens."""
    first = [read[group[0]] / read[group[0]].norm() for group in groups]
    sources, targets = range(1, len(groups), 2), range(0, len(groups), 2)
    assert leave <= len(sources), "this reference knows no other split"
    best = {s: max((float(first[s] @ first[t]), -t) for t in targets) for s in sources}
    order = sorted(sources, key=lambda s: -best[s][0])
    into = {t: list(groups[t]) for t in targets}
    for s in order[:leave]:
        into[-best[s][1]] += groups[s]
    return [groups[s] for s in order[leave:]] + [into[t] for t in targets]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_attention_over_groups_of_patches(kind):
    assert_same(answer(merging(kind)), by_hand(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_before_the_patches_are_known(kind):
    model = made(kind)
    assert mergeable_layers(model, linears(model))[1] == KINDS[kind][2]


@pytest.mark.parametrize("kind", KINDS)
def test_without_leaving_nothing_changes_and_forgetting_undoes_it(kind):
    model = made(kind)
    expected, classes = answer(model), [type(module) for module in model.modules()]
    set_schedule(model, TokenSchedule((0, 0, 0), PATCHES), linears(model))
    assert schedule_of(model) is None
    assert torch.equal(answer(model), expected)
    set_schedule(model, SCHEDULE, linears(model))
    assert schedule_of(model) == SCHEDULE
    assert not torch.equal(answer(model), expected)
    forget_schedule(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(answer(model), expected)


def test_a_schedule_rests_for_a_while():
    model = made("vit")
    dense, merged = answer(model), answer(merging("vit"))
    set_schedule(model, SCHEDULE, linears(model))
    with unmerged(model):
        assert torch.equal(answer(model), dense)
    with pytest.raises(KeyError), unmerged(model):
        raise KeyError
    assert schedule_of(model) == SCHEDULE
    assert torch.equal(answer(model), merged)
    forget_schedule(model)
    with unmerged(model):
        assert torch.equal(answer(model), dense)


def test_a_later_schedule_takes_the_place_of_the_first():
    model = merging("vit")
    set_schedule(model, other := TokenSchedule((5, 5, 5), PATCHES), linears(model))
    assert schedule_of(model) == other
    assert torch.equal(answer(model), answer(merging("vit", other)))


def test_more_than_half_may_leave_at_once():
    model = merging("vit", TokenSchedule((0, 10, 53), PATCHES))
    output = model(pixel_values=PIXELS, output_hidden_states=True)
    assert [states.shape[1] for states in output.hidden_states] == [65, 65, 55, 2]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_hidden_states_shrink_and_the_last_one_is_whole(kind):
    model = merging(kind)
    base = getattr(model, "base_model", model)
    output = base(pixel_values=PIXELS, output_hidden_states=True)
    assert output.last_hidden_state.shape[1] == 65
    assert [states.shape[1] for states in output.hidden_states][:3] == [65, 45, 45]
    torch.testing.assert_close(base(pixel_values=PIXELS).last_hidden_state, output.last_hidden_state)


def test_attentions_are_those_of_the_tokens_that_are_there():
    model = merging("vit")
    model.set_attn_implementation("eager")
    output = model(pixel_values=PIXELS, output_attentions=True)
    assert [tuple(a.shape[-2:]) for a in output.attentions] == [(65, 65), (45, 45), (45, 45)]
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading(kind, tmp_path):
    model = sparse(kind)
    expected = answer(model)
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["quantization_config"]["tokens"] == {"leave": [20, 0, 15], "patches": 64}
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert schedule_of(loaded) == SCHEDULE
    assert_same(answer(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(answer(type(model).from_pretrained(tmp_path / "again")), expected)


def test_the_three_ways_to_load(tmp_path):
    model = sparse()
    model.save_pretrained(tmp_path / "saved")
    folders = {"vit": ("AutoModelForImageClassification", str(tmp_path / "saved"))}
    for package, options in ((True, {}), (False, {"trust_remote_code": True})):
        found = answers_of(folders, tmp_path, package=package, **options)
        assert_same(found["vit"][1], answer(model))


def test_a_dequantized_model_is_a_native_one(tmp_path):
    model = sparse()
    dense = copy.deepcopy(model).dequantize()
    assert schedule_of(dense) is None
    assert type(dense) is ViTForImageClassification
    forget_schedule(model)
    assert_same(answer(dense), answer(model))
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path)


def test_copies_and_pickles_merge_too():
    model = sparse()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert schedule_of(other) == SCHEDULE
        assert torch.equal(answer(other), answer(model))
        forget_schedule(other)
    assert schedule_of(model) == SCHEDULE


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_implementations_and_precisions(implementation, dtype):
    model = merging("dinov2")
    expected = answer(model)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        found = model.to(dtype)(pixel_values=PIXELS.to(dtype)).logits.float()
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_sums_of_many_large_states_stay_finite_in_half_precision():
    states = torch.full((1, 64, 4), 6e4, dtype=torch.float16)
    groups = Groups(torch.ones(1, 64), torch.arange(64)[None])
    merged, after = merge(states, torch.ones(1, 64, 4), groups, 60, 0)
    assert merged.isfinite().all()
    assert int(after.sizes.sum()) == 64


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2"])
def test_compiled_and_exported(kind):
    torch._dynamo.reset()  # it compiles one function for no more than a few models
    model = sparse(kind)
    expected = answer(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled(pixel_values=PIXELS).logits, expected)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (), {"pixel_values": PIXELS}, dynamic_shapes={"pixel_values": {0: batch}})
        assert_same(program.module()(pixel_values=PIXELS).logits, expected)
        assert_same(program.module()(pixel_values=PIXELS[:1]).logits, expected[:1])


def test_nothing_is_scattered_from_an_empty_index():
    """Where all patches that may leave a layer do, none stays; OpenVINO 2026.4 refuses a scatter of none."""
    with torch.no_grad():
        program = torch.export.export(merging("vit", TokenSchedule((20, 0, 43), PATCHES)), (), {"pixel_values": PIXELS})
    scatters = [node for node in program.graph.nodes if "scatter" in str(node.target)]
    assert scatters
    for node in scatters:
        assert node.args[2].meta["val"].numel() > 0, node


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # 5.11 has no other
@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_and_without_checkpointing_gives_the_same_gradients(reentrant):
    plain, checkpointed = sparse().train(), sparse().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model(pixel_values=PIXELS.clone().requires_grad_(), labels=torch.arange(3)).loss.backward()
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in (plain, checkpointed)]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        other = grads[1][name]
        assert (grad is None) == (other is None), name
        if grad is not None:
            torch.testing.assert_close(other, grad)


def test_gradients_are_those_of_the_function():
    """Against differences, where no image is near a change of its groups."""
    model = merging("vit").double()
    pixels = PIXELS[:1].double()
    pixels.requires_grad_()
    loss = model(pixel_values=pixels).logits.square().sum()
    (grad,) = torch.autograd.grad(loss, pixels)
    step = 1e-6 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        ends = [model(pixel_values=pixels + sign * step).logits.square().sum() for sign in (1, -1)]
    assert float(ends[0] - ends[1]) / 2 == pytest.approx(float((grad * step).sum()), rel=1e-4)


def test_threads_do_not_disturb_each_other():
    model, images = sparse(), torch.randn(8, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = [model(pixel_values=batch).logits.detach() for batch in images]
    found = {}

    def work(number):
        with torch.no_grad():
            for _ in range(5):
                found[number] = model(pixel_values=images[number]).logits

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in enumerate(expected):
        torch.testing.assert_close(found[number], want)


def test_images_of_a_batch_merge_by_themselves():
    model = merging("vit")
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        together = model(pixel_values=images).logits
        alone = torch.cat([model(pixel_values=image[None]).logits for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_other_sizes_of_images_lose_the_same_share():
    model = merging("vit")
    images = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(5))
    output = model(pixel_values=images, interpolate_pos_encoding=True, output_hidden_states=True)
    patches = 12 * 10
    left = [patches, *(int(patches * left / 64 + 0.5) for left in (44, 44, 29))]
    assert [states.shape[1] - 1 for states in output.hidden_states] == left
    assert [TokenSchedule((63,), 64).remaining(n) for n in (1, 5, 1000)] == [[1], [1], [16]]


def test_a_pipeline_answers(tmp_path, processor):
    from PIL import Image

    model = sparse(id2label={i: f"class {i}" for i in range(4)})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    answers = classify([Image.new("RGB", (40, 30), color) for color in ("red", "blue")], top_k=2)
    assert [len(each) for each in answers] == [2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_model_that_runs(kind):
    model = merging(kind)
    flops = count_flops(model, merging=True)
    assert flops.unmerged == count_flops(model) == count_flops(made(kind))
    model.set_attn_implementation("eager")  # torch does not count fused attention on CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=PIXELS[:1])
    assert counter.get_total_flops() == flops.total
    prefix = KINDS[kind][2]
    for name in linears(model):
        assert tokens_read(model, name, PATCHES + prefix) == flops.linear_tokens[name], name
    assert passing_tokens(model, PATCHES + prefix) == (
        (64 + prefix, 44 + prefix),
        (44 + prefix, 44 + prefix),
        (44 + prefix, 29 + prefix),
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("beit"), r"BeitFor.*a bias for each pair of places \(.*relative_position_bias_table\)"),
        (lambda: tiny_model("swin"), r"SwinFor.*within windows"),
        (lambda: DINOv3ViTModel(DINOv3ViTConfig(**tiny_settings())), "DINOv3.*places turn the features"),
        (lambda: Dinov2Backbone(Dinov2Config(**tiny_settings())), "Dinov2Backbone.*maps of patches"),
    ],
)
def test_families_whose_tokens_cannot_merge_are_named(model, message):
    model = model()
    names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and ".0." in n]
    with pytest.raises(UnmergeableError, match=message):
        set_schedule(model, TokenSchedule((1, 1), 16), names)
    assert schedule_of(model) is None


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        ((1, 1), "2 numbers, but the model has 3 layers"),
        ((1, 1, 1, 1), "4 numbers, but the model has 3 layers"),
        ((30, 30, 4), "64 of 64 patches leave, so that 1 tokens are left"),
        ((60, 60, 0), "120 of 64 patches leave"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(leave, message):
    model = made("vit")
    with pytest.raises(BlockSparseFormatError, match=message):
        set_schedule(model, TokenSchedule(leave, PATCHES), linears(model))
    assert schedule_of(model) is None


def test_without_a_class_token_two_patches_stay():
    model = made("siglip")
    with pytest.raises(BlockSparseFormatError, match="63 of 64 patches leave, so that 1 tokens are left"):
        set_schedule(model, TokenSchedule((0, 0, 63), PATCHES), linears(model))
    set_schedule(model, TokenSchedule((0, 0, 62), PATCHES), linears(model))
    assert answer(model).shape[1] == 64


def test_masks_and_attentions_that_add_nothing_are_refused():
    model = merging("vit")
    with pytest.raises(UnmergeableError, match="attention_mask"):
        model(pixel_values=PIXELS, attention_mask=torch.ones(3, 65, dtype=torch.long).tril())
    model.vit.layers[1].attention.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    with pytest.raises(UnmergeableError, match=r"'flash_attention_2' adds nothing .* 'eager' or 'sdpa'"):
        model(pixel_values=PIXELS)


def test_layers_that_do_anything_else_are_not_known():
    assert has_halves(made("vit").vit.layers[0])

    class Other(type(made("vit").vit.layers[0])):
        def forward(self, states, attention_mask=None, **kwargs):
            return super().forward(states, attention_mask, **kwargs) * 2

    model = made("vit")
    model.vit.layers[1].__class__ = Other
    assert not has_halves(model.vit.layers[1])
    with pytest.raises(UnmergeableError, match=r"vit\.layers has a Other, which is not known"):
        set_schedule(model, SCHEDULE, linears(model))


def test_a_schedule_is_stored_with_a_part_of_a_model(tmp_path):
    model = sparse("vit")
    model.vit.save_pretrained(tmp_path)
    loaded = type(model.vit).from_pretrained(tmp_path)
    assert schedule_of(loaded) == SCHEDULE
    assert_same(answer(loaded), answer(model.vit))
    assert schedule_of(AutoModelForImageClassification.from_pretrained(tmp_path)) == SCHEDULE


def test_hooks_see_states_and_what_travels_with_them():
    model, seen = merging("vit"), []
    for layer in model.vit.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(pixel_values=PIXELS)
    assert [seen[i] for i in (0, 2, 4)] == [65, 45, 45]
    for states, sizes, places in (seen[i] for i in (1, 3, 5)):
        groups = Groups(sizes, places)
        assert int(sizes.sum()) == 3 * 65
        assert restore(states, groups).shape[1] == 65
        torch.testing.assert_close(averaged(restore(states, groups), groups), states)
