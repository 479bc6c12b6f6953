"""Finding, decoding, sampling and batching images."""

import time

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import ViTConfig

from hf_blockprune import DataError
from hf_blockprune.data import NO_LABEL, CorruptImages, batches, decode_image, load_images, num_batches

from .conftest import NUM_LABELS, tiny_settings, write_images


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def model_config(**changes):
    return ViTConfig(**tiny_settings(**changes))


def config_with_names(*names, both_ways=True):
    """A model's config with these classes; transformers does not derive label2id from id2label."""
    label2id = {"label2id": {name: i for i, name in enumerate(names)}} if both_ways else {}
    return model_config(id2label=dict(enumerate(names)), **label2id)


def picture(shade=0, size=8):
    return Image.fromarray(np.full((size, size, 3), shade, dtype=np.uint8))


def file_names(images):
    return sorted(record[images.image_column]["path"].rsplit("/", 1)[-1] for record in images.dataset)


def image_dataset(count, **columns):
    """A `datasets.Dataset` of pictures whose shade is their position."""
    return datasets.Dataset.from_dict({"image": [picture(i) for i in range(count)], **columns}).cast_column(
        "image", datasets.Image()
    )


def all_batches(images, processor, accelerator, batch_size=5, config=None):
    return list(
        batches(
            images, processor, batch_size=batch_size, accelerator=accelerator, model_config=config or model_config()
        )
    )


def labels_of(images, processor, accelerator, config=None):
    return torch.cat([b["labels"] for b in all_batches(images, processor, accelerator, config=config)]).tolist()


def test_folder_with_metadata_has_its_labels(images, processor, accelerator):
    found = load_images(str(images))
    assert (found.image_column, found.label_column, found.class_names) == ("image", "label", None)
    assert file_names(found) == [f"picture_{i:03d}.png" for i in range(24)]
    by_name = {r["image"]["path"].rsplit("/", 1)[-1]: r["label"] for r in found.dataset}
    assert by_name == {f"picture_{i:03d}.png": i % NUM_LABELS for i in range(24)}
    assert labels_of(found, processor, accelerator) == [r["label"] for r in found.dataset]


def test_a_path_object_serves_as_well_as_text(images):
    assert file_names(load_images(images)) == file_names(load_images(str(images)))


def class_folders(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture().save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("both_ways", [True, False])
def test_class_folders_get_the_indices_of_the_model(tmp_path, processor, accelerator, both_ways):
    found = load_images(class_folders(tmp_path, {"zebra": 2, "ant": 3}))
    assert found.class_names == ("ant", "zebra")
    config = config_with_names("rose", "zebra", "oak", "ant", both_ways=both_ways)
    assert sorted(labels_of(found, processor, accelerator, config)) == [1, 1, 3, 3, 3]


def test_class_folders_unknown_to_the_model_keep_their_own_indices(tmp_path, processor, accelerator):
    found = load_images(class_folders(tmp_path, {"zebra": 2, "ant": 3}))
    assert sorted(labels_of(found, processor, accelerator)) == [0, 0, 0, 1, 1]


def test_folder_without_labels(tmp_path, processor, accelerator):
    found = load_images(write_images(tmp_path / "unlabelled", 4, labels=False))
    assert (found.label_column, found.class_names) == (None, None)
    assert labels_of(found, processor, accelerator) == [NO_LABEL] * 4


def test_missing_labels_count_as_none(processor, accelerator):
    found = load_images(image_dataset(3, label=[2, None, 5]))
    assert labels_of(found, processor, accelerator) == [2, NO_LABEL, 5]


def test_label_that_is_no_class_index_is_refused(processor, accelerator):
    with pytest.raises(DataError, match="label"):
        labels_of(load_images(image_dataset(2, label=["cat", "dog"])), processor, accelerator)


@pytest.mark.parametrize("label", [NUM_LABELS, -2])
def test_label_outside_the_model_is_refused(processor, accelerator, label):
    with pytest.raises(DataError, match=rf"label {label} lies outside the model's 7 classes \(0 to 6\)"):
        labels_of(load_images(image_dataset(2, label=[0, label])), processor, accelerator)


def test_words_in_file_names_do_not_split_a_folder(tmp_path):
    names = ["train_1.png", "test_1.png", "val-2.png", "dev.png", "validation_3.png", "eval/test.png", "plain.png"]
    (tmp_path / "eval").mkdir()
    for name in names:
        picture().save(tmp_path / name)
    assert file_names(load_images(tmp_path)) == sorted(name.rsplit("/", 1)[-1] for name in names)


def test_other_files_beside_the_images_are_left_out(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "README.md").write_text("random pictures")
    assert file_names(load_images(tmp_path)) == [f"picture_{i:03d}.png" for i in range(3)]


def test_folder_of_parquet_files(tmp_path):
    image_dataset(3, label=[0, 1, 2]).to_parquet(tmp_path / "train.parquet")
    found = load_images(tmp_path)
    assert [r["label"] for r in found.dataset] == [0, 1, 2]
    assert np.asarray(decode_image(found.dataset[2]["image"])).max() == 2


def test_empty_folder_is_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: holds no images") as caught:
        load_images(empty)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere/to/be/found", "no-such-owner/no-such-set", "nowhere"])
def test_missing_folder_or_name_is_refused_at_once(name):
    begin = time.monotonic()
    with pytest.raises(DataError, match=rf"^{name}: no such folder, and no such data set on the Hub"):
        load_images(name)
    assert time.monotonic() - begin < 10


def test_dataset_object_is_taken_as_it_is(processor, accelerator):
    found = load_images(image_dataset(6, labels=[5, 4, 3, 2, 1, 0], note=list("abcdef")))
    assert (found.image_column, found.label_column) == ("image", "labels")
    assert set(found.dataset.column_names) == {"image", "labels"}
    assert labels_of(found, processor, accelerator) == [5, 4, 3, 2, 1, 0]


def test_class_names_of_a_dataset_object_are_matched_to_the_model(processor, accelerator):
    dataset = image_dataset(3, label=[0, 1, 1]).cast_column("label", datasets.ClassLabel(names=["oak", "rose"]))
    found = load_images(dataset)
    assert found.class_names == ("oak", "rose")
    assert labels_of(found, processor, accelerator, config_with_names("rose", "ant", "oak")) == [2, 0, 0]


@pytest.mark.parametrize("value", [3, None, [1, 2], torch.zeros(2)])
def test_other_objects_are_refused(value):
    with pytest.raises(DataError, match=r"expected an image folder, a data set name or a datasets\.Dataset"):
        load_images(value)


def test_empty_dataset_object_is_refused():
    empty = datasets.Dataset.from_dict({"image": []}).cast_column("image", datasets.Image())
    with pytest.raises(DataError, match="holds no images"):
        load_images(empty)


def splits(**sizes):
    return datasets.DatasetDict({name: image_dataset(size) for name, size in sizes.items()})


def test_split_is_the_first_preferred_one():
    found = splits(test=1, train=2, validation=3)
    assert len(load_images(found).dataset) == 2
    assert len(load_images(found, prefer_splits=("validation", "test")).dataset) == 3
    assert len(load_images(found, prefer_splits=("dev", "test")).dataset) == 1
    assert len(load_images(found, split="validation").dataset) == 3


def test_only_split_is_taken_whatever_its_name():
    assert len(load_images(splits(extra=4)).dataset) == 4


def test_split_that_does_not_exist_is_refused_with_the_ones_that_do():
    with pytest.raises(DataError, match="has no split 'dev'; choose one of test, validation"):
        load_images(splits(test=1, validation=1), split="dev")


def test_choice_of_split_is_left_to_the_user_where_none_is_preferred():
    with pytest.raises(DataError, match="name a split; it has test, validation"):
        load_images(splits(test=1, validation=1))


def test_dataset_without_images_is_refused():
    with pytest.raises(DataError, match=r"no image column among \['text', 'label'\]; cast one to datasets\.Image"):
        load_images(datasets.Dataset.from_dict({"text": ["a"], "label": [0]}))


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg")])
def test_pictures_of_every_mode_become_rgb(tmp_path, processor, accelerator, mode, suffix):
    picture(102, 32).convert(mode).save(tmp_path / f"one.{suffix}")
    found = load_images(tmp_path)
    decoded = decode_image(found.dataset[0]["image"])
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - 102).max() <= 4
    (batch,) = all_batches(found, processor, accelerator)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
    """A picture stored as the camera held it looks like the upright one."""
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8, :8] = 255
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = Image.fromarray(upright)
    if undo is not None:
        stored = stored.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(decode_image(load_images(tmp_path).dataset[0]["image"]), upright)


def shades(images):
    return [int(np.asarray(decode_image(record["image"])).max()) for record in images.dataset]


def test_sample_is_drawn_once_without_repeats():
    found = load_images(image_dataset(40))
    drawn = shades(found.sample(15, seed=3))
    assert len(set(drawn)) == len(drawn) == 15
    assert shades(found.sample(15, seed=3)) == drawn
    assert shades(found.sample(15, seed=4)) != drawn
    assert drawn != list(range(15))
    assert len(found.dataset) == 40


@pytest.mark.parametrize("samples", [40, 41, 10**6])
def test_sample_of_all_images_is_the_data_set(samples):
    found = load_images(image_dataset(40))
    assert sorted(shades(found.sample(samples, seed=0))) == list(range(40))
    assert shades(found.sample(samples, seed=0))[:15] == shades(found.sample(15, seed=0))


def test_sample_of_a_stream_is_its_beginning():
    stream = load_images(image_dataset(10).to_iterable_dataset())
    assert stream.streaming
    assert shades(stream.sample(4, seed=9)) == [0, 1, 2, 3]
    assert shades(stream.sample(20, seed=9)) == list(range(10))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 24, 30])
def test_batches_hold_every_image_once(processor, accelerator, images, streaming, batch_size):
    dataset = load_images(images).dataset
    expected = [processor(images=decode_image(r["image"]), return_tensors="pt")["pixel_values"][0] for r in dataset]
    found = load_images(dataset.to_iterable_dataset() if streaming else dataset)
    got = all_batches(found, processor, accelerator, batch_size)
    sizes = [len(batch["index"]) for batch in got]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert torch.cat([b["index"] for b in got]).tolist() == list(range(24))
    assert torch.cat([b["labels"] for b in got]).tolist() == [r["label"] for r in dataset]
    assert torch.equal(torch.cat([b["pixel_values"] for b in got]), torch.stack(expected))
    assert num_batches(found, batch_size, 1) == (None if streaming else len(got))


@pytest.mark.parametrize(("processes", "expected"), [(1, 5), (2, 3), (3, 2), (5, 1), (9, 1)])
def test_number_of_batches_is_that_of_the_busiest_process(images, processes, expected):
    assert num_batches(load_images(images), 5, processes) == expected


def count_corrupt(found, processor, accelerator):
    corrupt = CorruptImages(found.name)
    got = all_batches(found, processor, accelerator, batch_size=16)
    for batch in got:
        corrupt.count(batch)
    return corrupt, got


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"text": b"not a picture", "empty": b"", "cut short": content[: len(content) // 2]}[how])


@pytest.mark.parametrize("how", ["text", "empty", "cut short"])
def test_corrupt_file_is_named_skipped_and_counted(tmp_path, processor, accelerator, how):
    write_images(tmp_path, 150, size=8)
    damage(tmp_path / "picture_077.png", how)
    corrupt, got = count_corrupt(load_images(tmp_path), processor, accelerator)
    assert [name.rsplit("/", 1)[-1] for name in corrupt.files] == ["picture_077.png"]
    assert corrupt.seen == 150
    corrupt.check()
    assert sorted(torch.cat([b["index"] for b in got]).tolist()) == [i for i in range(150) if i != 77]
    assert all(len(b["pixel_values"]) == len(b["labels"]) == len(b["index"]) for b in got)


def test_more_than_one_in_a_hundred_corrupt_is_refused(tmp_path, processor, accelerator):
    write_images(tmp_path, 20, size=8)
    damage(tmp_path / "picture_003.png", "text")
    damage(tmp_path / "picture_011.png", "cut short")
    corrupt, _ = count_corrupt(load_images(tmp_path), processor, accelerator)
    with pytest.raises(
        DataError, match=r"2 of 20 images cannot be decoded, more than 1%: .*picture_003\.png"
    ) as caught:
        corrupt.check()
    assert "picture_011.png" in str(caught.value)


def test_batch_of_corrupt_images_alone_has_no_pixels(tmp_path, processor, accelerator):
    write_images(tmp_path, 2, size=8)
    damage(tmp_path / "picture_000.png", "text")
    first, second = all_batches(load_images(tmp_path), processor, accelerator, batch_size=1)
    assert "pixel_values" not in first
    assert len(first["corrupt"]) == 1
    assert len(second["pixel_values"]) == 1


def test_record_without_a_picture_counts_as_corrupt(processor, accelerator):
    dataset = datasets.Dataset.from_dict(
        {"image": [picture(), None], "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    (batch,) = all_batches(load_images(dataset), processor, accelerator)
    assert batch["index"].tolist() == [0]
    assert batch["corrupt"] == ["image 1"]
