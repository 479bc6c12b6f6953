"""Splits by the names of folders, files and rows, in any spelling."""

import datasets
import pytest
from PIL import Image

from hf_blockprune import DataError, DataSource
from hf_blockprune.data.batches import load_images
from hf_blockprune.sources.splits import choose_split, split_of, splits_by_name

MEASURE = ("validation", "test", "train")


def pictures(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def classes_in(root, *splits):
    """A picture of a cat and a dog in each folder, two of each in the first."""
    names = [f"{split}/{kind}/0.png" for split in splits for kind in ("cat", "dog")]
    return pictures(root, *names, *(f"{splits[0]}/{kind}/1.png" for kind in ("cat", "dog")))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[
            (name, "train")
            for name in ("train", "Train", "TRAINING", "train_set", "trainset", "train-clean-100", "Train2017")
        ],
        *[
            (name, "validation")
            for name in ("val", "Val2017", "validation_set", "valid", "DEV", "val-images", "valset")
        ],
        *[(name, "test") for name in ("Testing", "test_images", "testset", "eval", "Evaluation", "test-clean")],
        *[
            (name, None)
            for name in ("trains", "train station", "steam train", "cat", "protest", "valley", "devil", "", "12")
        ],
        ("train_test", None),
    ],
)
def test_names_of_splits(name, split):
    assert split_of(name) == split


def test_names_that_differ_in_the_split_alone():
    assert splits_by_name(["birds_train", "birds_val"]) == {"birds_train": "train", "birds_val": "validation"}
    assert splits_by_name(["birds_train", "bees_val"]) is None


@pytest.mark.parametrize(
    ("train", "other"),
    [("Train", "Val"), ("TRAIN", "TEST"), ("train_set", "val2017"), ("training", "validation_set"),
     ("trainset", "Testing"), ("train-clean", "test-clean"), ("birds_train", "birds_val"),
     ("inside/Train", "inside/Val"), ("trainA", "testA"), ("train/train", "train/val")],
)  # fmt: skip
def test_split_folders_in_any_spelling(tmp_path, train, other):
    classes_in(tmp_path, train, other)
    calibration, evaluation = load_images(tmp_path), load_images(tmp_path, prefer_splits=MEASURE)
    assert (len(calibration.dataset), len(evaluation.dataset)) == (4, 2)
    assert calibration.class_names == evaluation.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val", "extra"), "holds extra, train, val, of which train, val look like splits beside others"),
        (("Train", "holdout"), "holds Train, holdout, of which Train look like splits"),
        (("train_station", "test_tube"), "they may be splits or classes"),
        (("trainA", "testA", "trainB", "testB"), "they may be splits or classes"),
    ],
)
def test_folders_that_may_be_splits_or_not_are_refused(tmp_path, folders, expected):
    with pytest.raises(DataError, match=expected):
        load_images(classes_in(tmp_path, *folders))


def test_splits_inside_of_classes_are_refused(tmp_path):
    pictures(tmp_path, "cat/train/0.png", "cat/test/0.png", "dog/train/0.png", "dog/test/0.png")
    with pytest.raises(DataError, match="test, train lie inside of cat, dog; put classes into folders of splits"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("scan_train/cat", "scan_test/cat", "scan_new"), "of which scan_test, scan_train look like splits beside"),
        (("train/cat", "train/dog", "holdout"), "holds holdout, train, of which train look like splits"),
        (("photos/train/cat", "photos/val/cat", "masks/train/cat"), "train, val lie inside of masks, photos"),
        (("2020/train/cat", "2020/val/cat", "2021/val/cat"), "train, val lie inside of 2020, 2021"),
        (("train", "val", "."), "holds train, val, of which train, val look like splits beside others"),
    ],
)
def test_splits_beside_what_is_none_never_become_one_set(tmp_path, names, expected):
    with pytest.raises(DataError, match=expected):
        load_images(pictures(tmp_path, *(f"{name}/0.png" for name in names)))


@pytest.mark.parametrize(
    "folders",
    [
        ("bus", "car", "train"),
        ("test", "train", "bus"),
        ("steam train", "model train"),
        ("crash test", "steam train", "bus"),
    ],
)
def test_classes_named_like_splits_stay_classes(tmp_path, folders):
    found = load_images(pictures(tmp_path, *(f"{name}/0.png" for name in folders)))
    assert found.class_names == tuple(sorted(folders))


def test_hidden_folders_are_no_part_of_it(tmp_path):
    classes_in(tmp_path, "train", "val")
    pictures(tmp_path, "__MACOSX/0.png", ".cache/0.png")
    assert len(load_images(tmp_path, prefer_splits=MEASURE).dataset) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_split_column_of_metadata(tmp_path, streaming):
    pictures(tmp_path, *(f"{i}.png" for i in range(6)))
    said = ["Train", "train", "val", "test", "train", "val"]
    rows = [f"{i}.png,{i},{split}" for i, split in enumerate(said)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label,split", *rows]) + "\n")
    source = DataSource(tmp_path, streaming=streaming)
    assert [row["label"] for row in load_images(source).dataset] == [0, 1, 4]
    assert [row["label"] for row in load_images(source, prefer_splits=MEASURE).dataset] == [2, 5]
    assert [row["label"] for row in load_images(source, split="test").dataset] == [3]


@pytest.mark.parametrize("column", ["Split", "data_split", "subset", "partition", "Set"])
def test_split_column_may_be_called_otherwise(tmp_path, column):
    pictures(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,{column}\n0.png,train\n1.png,train\n2.png,val\n")
    assert len(load_images(tmp_path).dataset) == 2
    assert len(load_images(tmp_path, prefer_splits=MEASURE).dataset) == 1


@pytest.mark.parametrize(
    ("column", "one", "two"), [("split", "first fold", "second fold"), ("subset", "train", "cars")]
)
def test_split_column_of_other_words_is_left_alone(tmp_path, column, one, two):
    pictures(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,{column}\n0.png,{one}\n1.png,{two}\n")
    assert len(load_images(tmp_path).dataset) == 2


def test_split_column_with_gaps_is_refused(tmp_path):
    pictures(tmp_path, "0.png", "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,split\n0.png,train\n1.png,\n")
    with pytest.raises(DataError, match="its column split says nothing in some rows"):
        load_images(tmp_path)


def tables(root, *names):
    """Parquet files of 1, 2, ... rows."""
    for count, name in enumerate(names, 1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * count})
        rows.to_parquet(root / f"{name}.parquet")
    return root


@pytest.mark.parametrize(
    "names", [("Train-0", "Val-0"), ("train-0", "Val-0"), ("TRAIN/a", "TEST/b"), ("train-0", "val-0")]
)
def test_tables_of_splits(tmp_path, names):
    tables(tmp_path, *names)
    assert len(load_images(tmp_path).dataset) == 1
    assert len(load_images(tmp_path, prefer_splits=MEASURE).dataset) == 2


def test_tables_that_say_no_split_beside_others_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"more\.parquet says no split while other files there do \(train, validation\)"
    ):
        load_images(tables(tmp_path, "Train", "Val", "more"))


def test_splits_of_a_dictionary_in_any_spelling():
    assert choose_split(["Train", "Val"], None, MEASURE, "x") == "Val"
    assert choose_split(["Training", "hold"], None, ("train",), "x") == "Training"
    with pytest.raises(DataError, match=r"name a split; train\.clean, train\.other may each be meant"):
        choose_split(["train.clean", "train.other"], None, ("train",), "x")


@pytest.mark.parametrize(("asked", "found"), [("VAL2017", "val2017"), ("Validation", "val2017"), ("train", "Train")])
def test_a_split_is_asked_for_in_any_spelling(asked, found):
    assert choose_split(["Train", "val2017"], asked, MEASURE, "x") == found


@pytest.mark.parametrize("asked", ["train[:10%]", "holdout", "test"])
def test_a_split_that_is_not_there_or_may_be_several_is_refused(asked):
    with pytest.raises(DataError, match="has no split"):
        choose_split(["train", "test1", "test2"], asked, (), "x")
