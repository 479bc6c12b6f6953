"""Every kind of data set gives the same images: formats and transforms of `datasets`, arrays, lists, pairs."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_blockprune import BlockPruneConfig, BlockPruner, DataError, DataSource, FinetuneConfig
from hf_blockprune.data.batches import batches, load_images
from tests.conftest import NUM_LABELS, tiny_config, tiny_model

COUNT = 20
ARRAYS = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(COUNT)]
PICTURES = [Image.fromarray(array) for array in ARRAYS]
LABELS = [i % NUM_LABELS for i in range(COUNT)]


def table(images=PICTURES, column="image", **features):
    found = datasets.Dataset.from_dict({column: images, "label": LABELS})
    return found.cast(datasets.Features({**found.features, **features})) if features else found


def pixels_of(pictures):
    """What an image processor makes of them, by hand."""
    return [torch.from_numpy(np.asarray(p).astype(np.float32).transpose(2, 0, 1) / 127.5 - 1) for p in pictures]


def transform(rows):
    return {"pixel_values": pixels_of(rows["image"]), "label": rows["label"]}


def of_paths(rows):
    return {"image": [PICTURES[i] for i in rows["number"]], "label": rows["label"]}


class Pairs(torch.utils.data.Dataset):
    """As torchvision has them."""

    def __init__(self, images):
        self.images = images
        self.classes = [f"class {i}" for i in range(NUM_LABELS)]

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return self.images[index], LABELS[index]


def rows():
    yield from ({"image": picture, "label": label} for picture, label in zip(PICTURES, LABELS, strict=True))


ARRAY = datasets.Array3D((32, 32, 3), "uint8")
SAME = {
    **{f"format {form}": lambda form=form: table().with_format(form) for form in ("torch", "numpy", "pandas", "arrow")},
    "stream with a format": lambda: table().to_iterable_dataset().with_format("torch"),
    "transform to pixel_values": lambda: table().with_transform(transform),
    "transform that makes the images": lambda: table(list(range(COUNT)), "number").with_transform(of_paths),
    "Array3D": lambda: table(ARRAYS, image=ARRAY),
    "Array3D as tensors": lambda: table(ARRAYS, image=ARRAY).with_format("torch"),
    "lists of numbers": lambda: table([array.tolist() for array in ARRAYS]),
    "channels first": lambda: table([array.transpose(2, 0, 1) for array in ARRAYS], "img"),
    "floats up to 1": lambda: table([array / np.float32(255) for array in ARRAYS]),
    "pixel_values": lambda: table([pixels.numpy() for pixels in pixels_of(PICTURES)], "pixel_values"),
    "stream of pixel_values": lambda: table().to_iterable_dataset().map(
        transform, batched=True, remove_columns="image"
    ),
    "stream of changed pictures": lambda: table().to_iterable_dataset().map(lambda r: {"image": r["image"].copy()}),
    "generator": lambda: datasets.IterableDataset.from_generator(rows),
    "renamed column": lambda: table().rename_column("image", "photo"),
    "plain dictionary of splits": lambda: {"train": table(), "test": table()},
    "pairs": lambda: Pairs(PICTURES),
    "pairs of bytes as tensors": lambda: Pairs([torch.from_numpy(array).permute(2, 0, 1) for array in ARRAYS]),
    "pairs of pixel_values": lambda: Pairs(pixels_of(PICTURES)),
    "part of pairs": lambda: torch.utils.data.Subset(Pairs(PICTURES), range(COUNT)),
    "tensors": lambda: torch.utils.data.TensorDataset(torch.stack(pixels_of(PICTURES)), torch.tensor(LABELS)),
    "list of pairs": lambda: list(zip(PICTURES, LABELS, strict=True)),
    "list of records": lambda: list(rows()),
}  # fmt: skip


def everything(found, processor, accelerator):
    config = tiny_config("vit")
    got = list(batches(found, processor, batch_size=8, accelerator=accelerator, model_config=config))
    assert not [file for batch in got for file in batch["corrupt"]]
    return torch.cat([b["pixel_values"] for b in got]), torch.cat([b["labels"] for b in got]).tolist()


@pytest.mark.parametrize("kind", SAME)
def test_every_kind_gives_the_same_images(processor, accelerator, kind):
    pixels, labels = everything(load_images(SAME[kind]()), processor, accelerator)
    assert labels == LABELS
    torch.testing.assert_close(pixels, torch.stack(pixels_of(PICTURES)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["transform to pixel_values", "pixel_values", "pairs", "Array3D", "stream with a format"]
)
def test_models_are_pruned_and_measured_on_them(processor, kind):
    config = {"block_shape": [16, 16], "budget": {"metric": "density", "ratio": 0.5}}
    pruner = BlockPruner(tiny_model(), processor, BlockPruneConfig.from_dict(config), name="tiny")
    pruner.prune(SAME[kind]())
    assert pruner.report()["calibration"]["num_images"] == COUNT
    assert pruner.evaluate(SAME[kind]()).num_images == COUNT


@pytest.mark.parametrize("kind", ["paths", "bytes", "records"])
def test_columns_with_usual_names_may_hold_paths_or_bytes(tmp_path, processor, accelerator, kind):
    files = [tmp_path / f"{i}.png" for i in range(COUNT)]
    for file, picture in zip(files, PICTURES, strict=True):
        picture.save(file)
    values = {"paths": [str(file) for file in files], "bytes": [file.read_bytes() for file in files]}
    values["records"] = [{"bytes": content, "path": None} for content in values["bytes"]]
    pixels, _ = everything(load_images(table(values[kind])), processor, accelerator)
    torch.testing.assert_close(pixels, torch.stack(pixels_of(PICTURES)), rtol=0, atol=1e-5)


def test_images_without_labels(processor, accelerator):
    pixels, labels = everything(load_images(PICTURES), processor, accelerator)
    assert labels == [-1] * COUNT
    assert len(pixels) == COUNT


def test_sample_of_items_is_that_of_a_table(processor, accelerator):
    chosen = [everything(load_images(one).sample(7, 3), processor, accelerator) for one in (Pairs(PICTURES), table())]
    assert chosen[0][1] == chosen[1][1]
    assert torch.equal(chosen[0][0], chosen[1][0])


def test_classes_of_torch_data_sets_are_known():
    assert load_images(Pairs(PICTURES)).class_names == tuple(f"class {i}" for i in range(NUM_LABELS))
    assert load_images(torch.utils.data.Subset(Pairs(PICTURES), [1])).class_names == tuple(
        f"class {i}" for i in range(NUM_LABELS)
    )


def test_mode_of_the_column_is_kept(processor, accelerator):
    pixels, _ = everything(load_images(table(image=datasets.Image(mode="L"))), processor, accelerator)
    assert torch.equal(pixels[:, 0], pixels[:, 2])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: table().to_iterable_dataset().batch(4), "column 'image' holds several images a row"),
        (
            lambda: torch.utils.data.DataLoader(Pairs(PICTURES)),
            "or a list or torch data set of images.*pass the data set",
        ),
        (rows, "expected an image folder, a data set name or a datasets.Dataset"),
        (lambda: torch.zeros(4, 3, 32, 32), "expected an image folder, a data set name or a datasets.Dataset"),
        (lambda: [{"text": "a"}], "no image among text; name one of them as image_column"),
        (lambda: DataSource(list(rows()), label_column="kind"), "has no 'kind'; choose the labels from image, label"),
    ],
)
def test_what_is_no_data_set_of_images_is_refused_in_a_line(make, expected):
    with pytest.raises(DataError, match=expected) as caught:
        load_images(make())
    assert "\n" not in str(caught.value)


def test_pixel_values_of_another_size_are_refused(processor):
    dataset = table([np.zeros((3, 16, 16), np.float32)] * COUNT, "pixel_values")
    with pytest.raises(DataError, match="an image is 16x16, the model takes 32x32"):
        BlockPruner(tiny_model(), processor).evaluate(dataset)


def test_pixel_values_are_no_pictures_to_augment(processor):
    config = {"block_shape": [16, 16], "method": "magnitude", "refit": False}
    budget = {"metric": "density", "ratio": 0.5}
    pruner = BlockPruner(tiny_model(), processor, BlockPruneConfig.from_dict({**config, "budget": budget}))
    pruner.prune()
    values = {"epochs": 1, "warmup_epochs": 0, "batch_size": 10, "distillation": {"kind": "none"}, "ema": None}
    with pytest.raises(DataError, match="views are made of pictures, not of pixel_values; set augment to null"):
        pruner.finetune(SAME["pixel_values"](), FinetuneConfig.from_dict(values))
    pruner.finetune(SAME["pixel_values"](), FinetuneConfig.from_dict({**values, "augment": None}))
    assert pruner.report()["finetuning"]["steps"] == 2
