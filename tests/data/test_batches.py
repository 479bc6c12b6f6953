"""Finding, decoding, sampling and batching images."""

import time

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import ViTConfig

from hf_blockprune import ConfigError, DataError, DataSource
from hf_blockprune.data.batches import CorruptImages, ImageSet, batches, decode_image, load_images, num_batches
from hf_blockprune.model.tasks import NO_LABEL
from tests.conftest import NUM_LABELS, tiny_settings, write_images


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


def test_folder_without_labels(tmp_path, processor, accelerator):
    found = load_images(write_images(tmp_path / "unlabelled", 4, labels=False))
    assert (found.label_column, found.class_names) == (None, None)
    assert labels_of(found, processor, accelerator) == [NO_LABEL] * 4


def test_missing_labels_count_as_none(processor, accelerator):
    found = load_images(image_dataset(3, label=[2, None, 5]))
    assert labels_of(found, processor, accelerator) == [2, NO_LABEL, 5]


def test_labels_in_text_are_names_of_the_model(processor, accelerator):
    found = load_images(image_dataset(4, label=["oak", "ant", None, "oak"]))
    assert labels_of(found, processor, accelerator, config_with_names("rose", "ant", "oak")) == [2, 1, NO_LABEL, 2]


def test_label_in_text_that_the_model_does_not_know_is_refused(processor, accelerator):
    with pytest.raises(DataError, match=r"label 'cat' is no class of the model; expected names such as 'class 0'"):
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


def split_folders(root, **counts):
    """One picture for each class of each folder: `{"train/cat": 2}` with underscores for slashes."""
    for name, count in counts.items():
        class_folders(root, {name.replace("_", "/"): count})
    return root


def test_split_folders_are_splits(tmp_path):
    split_folders(tmp_path, train_cat=2, train_dog=1, val_cat=3, val_dog=1)
    calibration = load_images(tmp_path)
    assert (len(calibration.dataset), calibration.class_names) == (3, ("cat", "dog"))
    evaluation = load_images(tmp_path, prefer_splits=("validation", "test", "train"))
    assert (len(evaluation.dataset), evaluation.class_names) == (4, ("cat", "dog"))
    assert len(load_images(tmp_path, split="validation").dataset) == 4
    with pytest.raises(DataError, match="has no split 'test'; choose one of train, validation"):
        load_images(tmp_path, split="test")
    assert load_images(DataSource(tmp_path, split="validation")).dataset.split == "validation"


def test_folders_of_one_split_belong_together(tmp_path):
    split_folders(tmp_path, dev_cat=1, validation_dog=2, test_cat=4)
    found = load_images(tmp_path, split="validation")
    assert (len(found.dataset), found.class_names) == (3, ("cat", "dog"))


def test_split_folders_without_classes_are_no_classes(tmp_path, processor, accelerator):
    split_folders(tmp_path, train=3, test=2)
    found = load_images(tmp_path)
    assert labels_of(found, processor, accelerator) == [NO_LABEL] * 3


def test_split_folders_with_metadata_of_their_own(tmp_path):
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "test", 2)
    assert [r["label"] for r in load_images(tmp_path).dataset] == [0, 1, 2, 3]
    assert [r["label"] for r in load_images(tmp_path, split="test").dataset] == [0, 1]


def test_metadata_beside_split_folders_is_refused(tmp_path):
    """The loader would count its rows to every split."""
    split_folders(tmp_path, train=1, test=1)
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/0.png,0\ntest/0.png,1\n")
    with pytest.raises(DataError, match=r"metadata\.csv lies beside split folders; give each of train, test its own"):
        load_images(tmp_path)


def test_class_named_like_a_split_is_a_class(tmp_path):
    found = load_images(class_folders(tmp_path, {"bus": 1, "test": 2, "train": 3}))
    assert (len(found.dataset), found.class_names) == (6, ("bus", "test", "train"))


def test_folder_with_brackets_in_its_name(tmp_path):
    found = load_images(class_folders(tmp_path / "set [1]", {"ant": 1, "bee": 2}))
    assert len(found.dataset) == 3
    image_dataset(2, label=[0, 1]).to_parquet(tmp_path / "part [0].parquet")
    assert len(load_images(tmp_path / "part [0].parquet").dataset) == 2


def test_other_files_beside_the_images_are_left_out(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "README.md").write_text("random pictures")
    assert file_names(load_images(tmp_path)) == [f"picture_{i:03d}.png" for i in range(3)]


def test_folder_of_parquet_files(tmp_path):
    image_dataset(3, label=[0, 1, 2]).to_parquet(tmp_path / "train.parquet")
    found = load_images(tmp_path)
    assert [r["label"] for r in found.dataset] == [0, 1, 2]
    assert np.asarray(decode_image(found.dataset[2]["image"])).max() == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_saved_to_disk(tmp_path, processor, accelerator, streaming):
    image_dataset(3, label=[2, 1, 0]).save_to_disk(tmp_path / "one")
    splits(train=1, test=2).save_to_disk(tmp_path / "several")
    one = load_images(DataSource(tmp_path / "one", streaming=streaming))
    assert one.streaming == streaming
    assert labels_of(one, processor, accelerator) == [2, 1, 0]
    assert shades(load_images(DataSource(tmp_path / "several", split="test", streaming=streaming))) == [0, 1]


def test_image_files_by_pattern(tmp_path):
    class_folders(tmp_path, {"ant": 1, "bee": 2})
    found = load_images(str(tmp_path / "*/*.png"))
    assert (len(found.dataset), found.class_names) == (3, ("ant", "bee"))


@pytest.mark.parametrize("name", ["*.tar", "shard-{0..2}.tar", ["one.tar", "two.tar"], []])
def test_files_that_are_not_there_are_refused(tmp_path, name):
    path = [tmp_path / part for part in name] if isinstance(name, list) else str(tmp_path / name)
    with pytest.raises(DataError, match=r"no file has such a name|no such file|list is empty"):
        load_images(path)


@pytest.mark.parametrize("names", [["a.zip"], ["a.tar", "b.parquet"], ["a.txt", "b.png"]])
def test_files_of_other_or_several_kinds_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"expected \.tar shards, \.parquet files or images, of one kind, got '\."):
        load_images([tmp_path / name for name in names])


def test_columns_can_be_named(processor, accelerator):
    dataset = image_dataset(3, label=[0, 0, 0], species=[4, 5, 6], photo=[picture(10 + i) for i in range(3)])
    found = load_images(DataSource(dataset, image_column="photo", label_column="species"))
    assert [int(np.asarray(decode_image(r["photo"])).max()) for r in found.dataset] == [10, 11, 12]
    assert labels_of(found, processor, accelerator) == [4, 5, 6]
    assert set(found.dataset.column_names) == {"photo", "species"}


@pytest.mark.parametrize("kind", ["path", "bytes", "both"])
def test_named_image_column_may_hold_paths_or_bytes(tmp_path, processor, accelerator, kind):
    file = tmp_path / "one.png"
    picture(7).save(file)
    value = {"path": str(file), "bytes": file.read_bytes(), "both": {"bytes": file.read_bytes(), "path": "x.png"}}[kind]
    dataset = datasets.Dataset.from_list([{"content": value, "label": 3}])
    found = load_images(DataSource(dataset, image_column="content"))
    assert int(np.asarray(decode_image(found.dataset[0]["content"])).max()) == 7
    assert labels_of(found, processor, accelerator) == [3]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image_column": "photo"}, "has no column 'photo'; choose the images from image, label, box"),
        ({"label_column": "species"}, "has no column 'species'; choose the labels from image, label, box"),
        ({"label_column": "box.left"}, r"has no column 'box\.left'"),
        ({"image_column": "label"}, "column 'label' holds no images but Value"),
        ({"label_column": "box"}, "column 'box' holds List, not one label an image or a list of them"),
        ({"label_column": "image"}, "column 'image' holds Image, not one label an image"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(columns, expected):
    dataset = image_dataset(2, label=[0, 1], box=[[[1, 2]], [[3, 4]]])
    with pytest.raises(DataError, match=expected):
        load_images(DataSource(dataset, **columns))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"path": "x", "colum": "y"}, "unknown key 'colum'; choose from path, config, split"),
        ({"split": "train"}, "name its path"),
        ({"path": "x", "streaming": "yes"}, "streaming must be true or false, got 'yes'"),
        ({"path": "x", "label_column": 3}, "label_column must be text, got 3"),
        ({"path": "x", "streaming": True, "shuffle_buffer": -1}, "shuffle_buffer must be a number of images, got -1"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(value, expected):
    with pytest.raises(ConfigError, match=expected):
        DataSource.of(value)


def test_configuration_of_files_is_refused(images):
    with pytest.raises(DataError, match="files have no configurations; leave out 'full'"):
        load_images(DataSource(images, config="full"))


def test_options_win_over_a_description():
    described = {"path": "x", "label_column": "a", "split": "b"}
    assert DataSource.of(described, label_column="c", split=None) == DataSource("x", label_column="c", split="b")
    assert DataSource.of("x", streaming=True) == DataSource.of(DataSource("x"), streaming=True)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("https://me:word@host/a.tar?sig=abc", "https://host/a.tar"),
        (["https://host/a.tar?sig=abc", "https://host/b.tar?sig=def"], "https://host/a.tar and 1 more"),
        ("/home/me/private/shards/*.tar", "shards/*.tar"),
        ("owner/set", "owner/set"),
        ("imagenet-1k", "imagenet-1k"),
    ],
)
def test_names_for_reports_hold_no_keys_and_no_folders(path, expected):
    images = ImageSet(image_dataset(1), DataSource(path).name, "image", None)
    assert images.public_name == expected


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


def test_record_with_neither_bytes_nor_path_counts_as_corrupt(processor, accelerator):
    rows = [{"content": {"bytes": None, "path": None}}, {"content": {"bytes": b"no picture", "path": "x.png"}}]
    found = load_images(DataSource(datasets.Dataset.from_list(rows), image_column="content"))
    (batch,) = all_batches(found, processor, accelerator)
    assert batch["corrupt"] == ["image 0", "x.png"]


def test_record_without_a_picture_counts_as_corrupt(processor, accelerator):
    dataset = datasets.Dataset.from_dict(
        {"image": [picture(), None], "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    (batch,) = all_batches(load_images(dataset), processor, accelerator)
    assert batch["index"].tolist() == [0]
    assert batch["corrupt"] == ["image 1"]


def test_a_column_may_be_called_as_anything_here_is(processor, accelerator):
    labels = [2, 0, 1]
    for column in ("index", "position", "labels", "pixel"):
        source = DataSource(image_dataset(3, **{column: labels}), label_column=column)
        assert labels_of(load_images(source), processor, accelerator) == labels
