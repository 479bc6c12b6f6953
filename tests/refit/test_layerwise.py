"""Refitting a whole model: against ridge regression on what hooks see, on every family, and through the pruner."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockPruneConfig, BlockPruner, ModelError
from hf_blockprune.data.batches import decode_image, load_images
from hf_blockprune.finetune.config import FinetuneConfig
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers, sparsify
from hf_blockprune.model.layers import layer_chain
from hf_blockprune.refit.boundary import first_inputs, learn_calls
from hf_blockprune.refit.layerwise import refit_layers
from hf_blockprune.refit.solve import RIDGES
from hf_blockprune.refit.stages import _stages
from hf_blockprune.score.blocks import expand_mask, grid_shape
from tests.conftest import RECIPE, tiny_model, whole_masks, write_images

BLOCK_SHAPE = (8, 8)
HELD_BACK = torch.arange(24) % 8 == 7  # every eighth image


@pytest.fixture(scope="module")
def pixels(found, processor):
    pictures = [decode_image(record["image"]) for record in found.dataset]
    return processor(images=pictures, return_tensors="pt")["pixel_values"]


def linears_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def random_masks(model, block_shape=BLOCK_SHAPE, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(grid_shape(tuple(linear.weight.shape), block_shape), generator=generator) < share
        for name, linear in linears_of(model).items()
    }


def refitted(model, masks, images, processor, accelerator, block_shape=BLOCK_SHAPE, **settings):
    settings = {"batch_size": 7, **settings}
    return refit_layers(model, masks, block_shape, images, processor, accelerator=accelerator, **settings)


def zero_removed(model, masks, block_shape=BLOCK_SHAPE):
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.data.mul_(expand_mask(mask, tuple(weight.shape), block_shape))
    return model


@torch.no_grad()
def logits_of(model, pixels):
    return model(pixel_values=pixels.to(model.dtype)).logits


@torch.no_grad()
def watched(model, modules, pixels):
    """Inputs and outputs of modules by name, for all images."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
        for name in modules
    ]
    model(pixel_values=pixels.to(model.dtype))
    for handle in handles:
        handle.remove()
    return seen


def ridge_regression(weight, keep, x, target, token_weight, ridge):
    """Weighted, pulled towards `weight` relative to each input's variance; (weights, bias) by one lstsq an output."""
    w = token_weight.repeat(len(x)).double()
    w, x, target = w / w.sum(), x.flatten(0, 1).double(), target.flatten(0, 1).double()
    x_mean, t_mean = w @ x, w @ target
    xc, tc = x - x_mean, target - t_mean
    pull = (ridge * (w @ xc.square())).sqrt()
    result = torch.zeros_like(weight, dtype=torch.float64)
    for row, on in enumerate(keep):
        if on.any():
            system = torch.cat([w.sqrt()[:, None] * xc[:, on], torch.diag(pull[on])])
            right = torch.cat([w.sqrt() * tc[:, row], pull[on] * weight[row, on].double()])
            result[row, on] = torch.linalg.lstsq(system, right, driver="gelsd").solution
    return result, t_mean - result @ x_mean


@pytest.mark.parametrize("weighted", [False, True])
def test_every_linear_solves_its_own_regression(found, processor, accelerator, pixels, weighted):
    """Inputs are those of the final model; o_proj and fc2 aim at the dense stream, the rest at dense outputs."""
    model, dense = tiny_model().double(), tiny_model().double()
    masks, names = random_masks(dense), list(linears_of(dense))
    generator = torch.Generator().manual_seed(5)
    token_weights = {name: torch.rand(17, generator=generator, dtype=torch.float64) + 0.1 for name in names}
    refits = refitted(model, masks, found, processor, accelerator, token_weights=token_weights if weighted else None)
    assert set(refits) == set(names)
    prefix = names[0].rpartition(".0.")[0]
    norms = [f"{prefix}.{i}.layernorm_{where}" for i in range(2) for where in ("before", "after")]
    have, wanted = watched(model, [*names, *norms], pixels), watched(dense, [*names, *norms], pixels)
    for name, result in refits.items():
        ridge = result.ridge
        layer = name[: len(prefix) + 2]
        if name.endswith("o_proj"):
            target = wanted[f"{layer}.layernorm_after"][0] - have[f"{layer}.layernorm_before"][0]
        elif name.endswith("fc2"):
            target = wanted[f"{layer}.layernorm_after"][0] + wanted[name][1] - have[f"{layer}.layernorm_after"][0]
        else:
            target = wanted[name][1]
        before, after = dense.get_submodule(name), model.get_submodule(name)
        keep = expand_mask(masks[name], tuple(before.weight.shape), BLOCK_SHAPE)
        token_weight = token_weights[name] if weighted else torch.ones(17, dtype=torch.float64)
        x = have[name][0]
        errors = {}
        for candidate in RIDGES:
            answer, bias = ridge_regression(
                before.weight.detach(), keep, x[~HELD_BACK], target[~HELD_BACK], token_weight, candidate
            )
            if candidate == ridge:
                torch.testing.assert_close(after.weight.detach(), answer, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(after.bias.detach(), bias, rtol=1e-5, atol=1e-6)
            error = (x[HELD_BACK] @ answer.t() - target[HELD_BACK]).flatten(0, 1)
            w = token_weight.repeat(int(HELD_BACK.sum()))[:, None] / token_weight.sum() / int(HELD_BACK.sum())
            errors[candidate] = float((w * (error - (w * error).sum(0)).square()).sum())
        assert ridge == min(errors, key=errors.get), name
        wanted_there = target[HELD_BACK].flatten(0, 1)
        spread = float((w * (wanted_there - (w * wanted_there).sum(0)).square()).sum())
        assert result.error == pytest.approx(errors[ridge] / spread, rel=1e-5)


@pytest.mark.parametrize("block_shape", [(8, 8), (16, 16), (20, 12)])
def test_removed_blocks_are_zero_and_logits_come_closer(family, found, processor, accelerator, pixels, block_shape):
    model, dense = tiny_model(family), tiny_model(family)
    masks = random_masks(dense, block_shape)
    refitted(model, masks, found, processor, accelerator, block_shape)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.detach()
        keep = expand_mask(mask, tuple(weight.shape), block_shape)
        assert (weight[~keep] == 0).all()
        assert (weight[keep] != 0).all()
    zeroed = zero_removed(tiny_model(family), masks, block_shape)
    target = logits_of(dense, pixels)
    errors = [float((logits_of(m, pixels) - target).square().mean()) for m in (model, zeroed)]
    assert errors[0] < 0.7 * errors[1]


def test_logits_come_closer_on_other_images_too(family, found, processor, accelerator, tmp_path):
    unseen = load_images(write_images(tmp_path, 24, seed=9))
    pictures = [decode_image(record["image"]) for record in unseen.dataset]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    model = tiny_model(family)
    masks = random_masks(model, share=0.7)
    refitted(model, masks, found, processor, accelerator)
    target = logits_of(tiny_model(family), pixels)
    zeroed = zero_removed(tiny_model(family), masks)
    errors = [float((logits_of(m, pixels) - target).square().mean()) for m in (model, zeroed)]
    assert errors[0] < errors[1]


def test_only_masked_linears_change(family, found, processor, accelerator):
    model, before = tiny_model(family), tiny_model(family).state_dict()
    masks = {name: mask for name, mask in random_masks(model).items() if name.endswith(("fc1", "fc2"))}
    assert set(refitted(model, masks, found, processor, accelerator)) == set(masks)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.{part}" for name in masks for part in ("weight", "bias")}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_layers_before_the_first_mask_are_passed_through(found, processor, accelerator):
    model, before = tiny_model(), tiny_model().state_dict()
    masks = {name: mask for name, mask in random_masks(model).items() if ".layers.1." in name}
    assert set(refitted(model, masks, found, processor, accelerator)) == set(masks)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if ".layers.0." in n)


def test_a_model_that_loses_nothing_stays_the_same(family, found, processor, accelerator, pixels):
    model = tiny_model(family)
    masks = {name: torch.ones_like(mask) for name, mask in random_masks(model).items()}
    refitted(model, masks, found, processor, accelerator)
    torch.testing.assert_close(logits_of(model, pixels), logits_of(tiny_model(family), pixels), rtol=0, atol=1e-3)


def test_batches_do_not_matter(found, processor, accelerator, pixels):
    logits = []
    for batch_size in (1, 7, 24):
        model = tiny_model().double()
        refitted(model, random_masks(model), found, processor, accelerator, batch_size=batch_size)
        logits.append(logits_of(model, pixels))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits[2], logits[0], rtol=0, atol=1e-6)


def test_equal_token_weights_are_no_token_weights(found, processor, accelerator):
    states = []
    for weights in (None, torch.full((17,), 3.0, dtype=torch.float64)):
        model = tiny_model().double()
        masks = random_masks(model)
        given = weights if weights is None else dict.fromkeys(masks, weights)
        refitted(model, masks, found, processor, accelerator, token_weights=given)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-7)


def test_linears_without_a_bias_get_one(found, processor, accelerator, pixels):
    model, dense = tiny_model(qkv_bias=False), tiny_model(qkv_bias=False)
    masks = random_masks(model)
    refitted(model, masks, found, processor, accelerator)
    for name in masks:
        assert isinstance(model.get_submodule(name).bias, torch.nn.Parameter)
    assert any(dense.get_submodule(name).bias is None for name in masks)
    zeroed = zero_removed(tiny_model(qkv_bias=False), masks)
    target = logits_of(dense, pixels)
    errors = [float((logits_of(m, pixels) - target).square().mean()) for m in (model, zeroed)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_stages(family, found, processor, accelerator, attention):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    masks = random_masks(model)
    units = layer_chain(model, masks)
    kept = first_inputs(model, units, found, processor, accelerator=accelerator, batch_size=7)
    assert [len(batch.dense) for batch in kept] == [7, 7, 7, 3]
    assert torch.equal(torch.cat([batch.held_back for batch in kept]), HELD_BACK)
    first = units[0]
    names = [name.removeprefix(f"{first.name}.") for name in masks if name.startswith(f"{first.name}.")]

    def stages(names):
        found = _stages(first, first.module, names, kept[0].dense)
        return [(sorted(n.rpartition(".")[2] for n in s.names), s.after_input, s.ends_layer) for s in found]

    assert stages(names) == [
        (["k_proj", "q_proj", "v_proj"], False, False),
        (["o_proj"], True, False),
        (["fc1"], False, False),
        (["fc2"], False, True),
    ]
    # Without all that is added to the stream the first one's share in the error cannot be told, but the last one's can.
    assert stages([name for name in names if not name.endswith("o_proj")])[-1] == (["fc2"], False, True)
    assert stages([name for name in names if not name.endswith("fc2")])[-2:] == [
        (["o_proj"], False, False),
        (["fc1"], False, False),
    ]


def test_dropout_is_off_even_in_training_mode(found, processor, accelerator, pixels):
    states = []
    for training in (False, True):
        model = tiny_model(hidden_dropout_prob=0.5).train(training)
        refitted(model, random_masks(model), found, processor, accelerator)
        assert model.training == training
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_come_closer_too(family, found, processor, accelerator, pixels, dtype):
    model, dense = tiny_model(family).to(dtype), tiny_model(family)
    masks = random_masks(model)
    refitted(model, masks, found, processor, accelerator)
    assert model.dtype == dtype
    zeroed = zero_removed(tiny_model(family), masks)
    target = logits_of(dense, pixels)
    errors = [float((logits_of(m, pixels) - target).square().mean()) for m in (model, zeroed)]
    assert errors[0] < 0.7 * errors[1]


def test_corrupt_images_are_left_out(processor, accelerator, tmp_path):
    images = load_images(write_images(tmp_path, 110, size=8))
    (tmp_path / "picture_013.png").write_bytes(b"not a picture")
    model = tiny_model()
    masks = {name: mask for name, mask in random_masks(model).items() if name.endswith("layers.0.mlp.fc1")}
    refitted(model, masks, images, processor, accelerator, batch_size=1)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_several_lists_of_layers_are_refused(found, processor, accelerator):
    model = torch.nn.Module()
    model.first = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
    model.second = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
    masks = {name: torch.ones(1, 1, dtype=torch.bool) for name in ("first.0", "second.0")}
    with pytest.raises(ModelError, match="several lists of layers; refit needs one"):
        refitted(model, masks, found, processor, accelerator)


def config(method="obs", ratio=0.6, **changes):
    changes = {"block_shape": (8, 4), "calibration": {"samples": 20, "batch_size": 6}, **changes}
    return BlockPruneConfig(method=method, budget={"metric": "flops", "ratio": ratio}, **changes)


def masks_of(model):
    return {name: module.mask() for name, module in block_sparse_layers(model)}


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}], ids=["bias", "no-qkv-bias"])
def test_obs_prunes_refits_saves_and_loads(family, processor, images, pixels, tmp_path, changes):
    pruner = BlockPruner(tiny_model(family, **changes), processor, config())
    model = pruner.prune(images)
    report = pruner.report()
    assert 0.6 * 0.995 <= report["flops_ratio"] <= 0.6
    assert len(report["layers"]) == 12
    assert all(layer["ridge"] in RIDGES for layer in report["layers"])
    assert all(layer["predicted_loss"] >= 0 for layer in report["layers"])
    assert report["seconds"]["refit"] > 0
    expected = logits_of(model, pixels)
    simple = BlockPruner(tiny_model(family, **changes), processor, config("magnitude")).prune(images)
    dense = logits_of(tiny_model(family, **changes), pixels)
    assert (expected - dense).square().mean() < (logits_of(simple, pixels) - dense).square().mean()
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded, pixels), expected, rtol=1e-5, atol=1e-5)


def test_obs_twice_gives_the_same_model(processor, images):
    first, second = (BlockPruner(tiny_model(), processor, config()).prune(images).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_obs_without_refit_keeps_the_surviving_weights(processor, images, pixels):
    pruner = BlockPruner(tiny_model(), processor, config(refit=False, permute=False))
    model = pruner.prune(images)
    zeroed = zero_removed(tiny_model(), whole_masks(model, tiny_model()), (8, 4))
    torch.testing.assert_close(logits_of(model, pixels), logits_of(zeroed, pixels), rtol=1e-5, atol=1e-5)
    assert all(layer["ridge"] is None for layer in pruner.report()["layers"])
    assert "refit" not in pruner.report()["seconds"]


@pytest.mark.parametrize("method", ["taylor", "magnitude"])
def test_other_methods_can_be_refitted(processor, images, pixels, method):
    """The masks stay those of the method, the logits come closer to the dense model's."""
    plain, repaired = (BlockPruner(tiny_model(), processor, config(method, refit=refit)) for refit in (False, True))
    before, after = plain.prune(images), repaired.prune(images)
    masks = masks_of(before)
    assert masks.keys() == masks_of(after).keys()
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(after).items())
    assert all(layer["ridge"] in RIDGES for layer in repaired.report()["layers"])
    assert repaired.report()["seconds"]["refit"] > 0
    dense = logits_of(tiny_model(), pixels)
    errors = [float((logits_of(model, pixels) - dense).square().mean()) for model in (after, before)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(("method", "refit"), [("obs", None), ("magnitude", True)])
def test_images_are_asked_for(processor, method, refit):
    with pytest.raises(ModelError, match="needs calibration images"):
        BlockPruner(tiny_model(), processor, config(method, refit=refit)).prune()


def test_two_images_are_enough(processor, images, pixels):
    few = config(calibration={"samples": 2, "batch_size": 6})
    model = BlockPruner(tiny_model(), processor, few).prune(images)
    assert logits_of(model, pixels).isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_one_image_is_enough_for_its_own_prediction(processor, images, pixels, seed):
    """Inputs that never vary say nothing about their weights, which stay; biases make outputs what they were."""
    one = config(calibration={"samples": 1, "batch_size": 6})
    dense, model = tiny_model(seed=seed), BlockPruner(tiny_model(seed=seed), processor, one).prune(images)
    drawn = load_images(images).sample(1, seed=0).dataset[0]["image"]
    chosen = processor(images=[decode_image(drawn)], return_tensors="pt")["pixel_values"]
    spread = logits_of(dense, pixels).std()
    assert (logits_of(model, chosen) - logits_of(dense, chosen)).abs().max() < 0.05 * spread
    assert logits_of(model, pixels).isfinite().all()


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])
def test_a_linear_without_any_block_becomes_the_constant_that_serves_best(
    family, found, processor, accelerator, pixels, part
):
    model, dense = tiny_model(family).double(), tiny_model(family).double()
    masks = random_masks(dense)
    name = next(name for name in masks if name.endswith(part))
    masks[name][:] = False
    refits = refitted(model, masks, found, processor, accelerator, residual_targets=False)
    linear = model.get_submodule(name)
    assert not linear.weight.any()
    wanted = watched(dense, [name], pixels[~HELD_BACK])[name][1]
    torch.testing.assert_close(linear.bias.detach(), wanted.flatten(0, 1).mean(0), rtol=1e-6, atol=1e-6)
    assert refits[name].error == pytest.approx(1.0, abs=0.2)  # a constant, on other images
    sparsify(model, masks, BLOCK_SHAPE)
    torch.testing.assert_close(
        logits_of(model, pixels.double()), logits_of(model.dequantize(), pixels.double()), rtol=1e-9, atol=1e-9
    )


def test_a_pruned_model_with_an_empty_layer_is_saved_loaded_recovered_and_trained(processor, images, pixels, tmp_path):
    model = tiny_model()
    masks = random_masks(model)
    empty = next(name for name in masks if name.endswith("q_proj"))
    masks[empty][:] = False
    sparsify(zero_removed(model, masks), masks, BLOCK_SHAPE)
    expected = logits_of(model, pixels)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    loaded = BlockPruner.from_pretrained(tmp_path / "out", config(recovery={"epochs": 1, "samples": 16}))
    torch.testing.assert_close(logits_of(loaded.model, pixels), expected, rtol=1e-5, atol=1e-5)
    loaded.recover(images, teacher=BlockPruner(tiny_model(), processor))
    settings = FinetuneConfig(epochs=1, batch_size=8, micro_batch=8, warmup_epochs=0, distillation={"kind": "none"})
    loaded.finetune(images, settings)
    assert loaded.model.get_submodule(empty).nnz_blocks == 0
    assert logits_of(loaded.model, pixels).isfinite().all()


def test_what_was_measured_says_which_layer_cannot_be_solved(found, processor, accelerator):
    """Sums that are not finite, as those of weights that overflow on some images, are no matrix to factorise."""
    model = tiny_model().double()
    name = "vit.layers.1.mlp.fc2"
    masks = random_masks(model)
    model.get_submodule("vit.layers.1.mlp.fc1").weight.data *= 1e200
    with pytest.raises(ModelError, match=rf"{name}.*use more calibration images"):
        refitted(model, masks, found, processor, accelerator)


def test_dropout_of_a_model_in_training_changes_nothing(processor, images):
    """As `Trainer` leaves a model; parts that were frozen in evaluation mode stay in it."""
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    evaluated = BlockPruner(tiny_model(**dropout), processor, config()).prune(images).state_dict()
    model = tiny_model(**dropout).train()
    model.vit.embeddings.eval()
    BlockPruner(model, processor, config()).prune(images)
    pruned = model.state_dict()
    assert pruned.keys() == evaluated.keys()
    assert all(torch.equal(pruned[name], evaluated[name]) for name in pruned)
    assert model.training
    assert model.vit.layers[0].training
    assert not model.vit.embeddings.training


def recipe_for(model, images, folder, samples):
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ndataset: {images}\noutput: out\nblock_shape: [8, 8]\nmethod: obs\n"
        f"budget: {{metric: flops, ratio: 0.6}}\ncalibration: {{samples: {samples}, batch_size: 4}}\n"
    )
    return recipe


@pytest.mark.slow
def test_two_processes_give_the_model_of_one(launch, processor, images, tmp_path):
    """In double precision, since single-precision sums over other batches round otherwise."""
    dense = tmp_path / "dense"
    tiny_model().double().save_pretrained(dense)
    processor.save_pretrained(dense)
    recipe = recipe_for(dense, images, tmp_path, 21)
    for processes in (1, 2):
        arguments = [RECIPE, "--config", recipe, "--output", tmp_path / f"out{processes}", "--quiet", "--json"]
        launch(arguments, processes=processes)
    one, two = (load_file(tmp_path / f"out{processes}/model.safetensors") for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
        else:
            assert torch.equal(two[name], value), name


@pytest.mark.slow
def test_a_process_without_images_does_no_harm(launch, small_folder, images, tmp_path):
    """Four images in batches of four: the second process has nothing to do but add up."""
    recipe = recipe_for(small_folder, images, tmp_path, 4)
    launch([RECIPE, "--config", recipe, "--output", tmp_path / "out", "--quiet", "--json"], processes=2)
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out/model.safetensors").values())


def test_layers_that_give_dictionaries_are_refused_by_name(accelerator):
    class Given(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, states):
            return {"states": self.linear(states["states"] if isinstance(states, dict) else states)}

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Given(), Given()])

        def forward(self, pixel_values):
            for layer in self.layers:
                pixel_values = layer({**pixel_values} if isinstance(pixel_values, dict) else pixel_values)

    model = Chain()
    layers = layer_chain(model, ["layers.0.linear", "layers.1.linear"])
    with pytest.raises(ModelError, match=r"layers\.1 does not take what the layer before it gives"):
        learn_calls(model, layers, torch.zeros(1, 4))
