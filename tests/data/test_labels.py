"""Labels of data sets as a model's: every picture lies under the model's own answer, so that it is right or refused."""

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_blockprune import BlockPruneConfig, BlockPruner, ConfigError, DataError, DataSource, ModelError
from hf_blockprune.data.batches import load_images
from hf_blockprune.data.class_names import ClassNames, _imagenet
from hf_blockprune.data.labels import Labels
from hf_blockprune.model.tasks import MULTI, NO_LABEL, REGRESSION
from tests.conftest import tiny_config, tiny_model

SYNSETS = _imagenet()
BREEDS = ["golden retriever, goldie", "tabby, tabby cat", "zebra", "great white shark, white shark", "ox", "yak", "emu"]


def both_ways(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def answered(model, processor, count=60):
    """(pictures, the model's class of each); its last layer is centred, so that many classes are answered."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model.classifier.bias -= model(pixel_values=pixels).logits.mean(0)
        answers = model(pixel_values=pixels).logits.argmax(-1).tolist()
    assert len(set(answers)) > 3
    return pictures, answers


def sorted_into(root, name_of, pictures, answers):
    for number, (picture, answer) in enumerate(zip(pictures, answers, strict=True)):
        folder = root / name_of(answer)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number}.png")
    return root


def accuracy(model, processor, data):
    return BlockPruner(model, processor).evaluate(data).top1


@pytest.mark.parametrize("name_of", [str, "{:03d}".format, "LABEL_{}".format, "class {}".format, "{}.0".format])
def test_folders_named_by_index_are_indices(tmp_path, processor, name_of):
    model = tiny_model(**both_ways([f"animal {chr(97 + (5 * i) % 23)}" for i in range(12)]))
    folder = sorted_into(tmp_path, name_of, *answered(model, processor))
    assert accuracy(model, processor, folder) == 1


@pytest.mark.parametrize(
    "name_of",
    [
        str,
        str.upper,
        lambda name: name.replace(" ", "_"),
        lambda name: name.split(",")[0].title().replace(" ", "-"),
        lambda name: name.split(", ")[-1],
    ],
)
def test_spellings_and_synonyms_of_names_are_found(tmp_path, processor, name_of):
    model = tiny_model(**both_ways(BREEDS))
    folder = sorted_into(tmp_path, lambda i: name_of(BREEDS[i]), *answered(model, processor))
    assert accuracy(model, processor, folder) == 1


def test_synsets_of_some_classes_are_found_in_a_model_with_names(tmp_path, processor):
    model = tiny_model(**both_ways(SYNSETS.values()))
    known = list(SYNSETS)
    folder = sorted_into(tmp_path, known.__getitem__, *answered(model, processor))
    assert accuracy(model, processor, folder) == 1


def test_names_are_found_in_a_model_with_synsets(tmp_path, processor):
    chosen = [list(SYNSETS)[i] for i in (207, 281, 340, 2, 345, 9, 101)]
    model = tiny_model(**both_ways(chosen))
    folder = sorted_into(tmp_path, lambda i: SYNSETS[chosen[i]].split(",")[0], *answered(model, processor))
    assert accuracy(model, processor, folder) == 1


def test_names_in_id2label_win_over_an_older_label2id(tmp_path, processor):
    model = tiny_model(**both_ways([f"class {i}" for i in range(7)]))
    model.config.id2label = dict(enumerate(sorted(BREEDS, reverse=True)))
    folder = sorted_into(tmp_path, model.config.id2label.get, *answered(model, processor))
    assert accuracy(model, processor, folder) == 1


def test_names_in_label2id_alone_are_found():
    config = tiny_config("vit", id2label=None, num_labels=3)
    config.label2id = {"ox": "2", "yak": "0", "emu": 1}
    names = ClassNames.of(config)
    assert [names.find(name) for name in ("yak", "emu", "Ox", "LABEL_1", "gnu")] == [{0}, {1}, {2}, {1}, set()]


@pytest.mark.parametrize("extra", ["zebu", "8", "Thumbs"])
def test_an_unknown_folder_is_refused_by_name(tmp_path, processor, extra):
    model = tiny_model(**both_ways(BREEDS))
    pictures, answers = answered(model, processor)
    folder = sorted_into(tmp_path, BREEDS.__getitem__, pictures, answers)
    sorted_into(folder, lambda _: extra, pictures[:1], [0])
    with pytest.raises(DataError, match=rf"1 of its \d classes cannot be told for one of the model's: '{extra}'"):
        accuracy(model, processor, folder)


def test_nothing_is_guessed_from_unknown_names(tmp_path, processor):
    """As many folders as classes: their order is no evidence."""
    model = tiny_model(**both_ways(BREEDS))
    pictures, answers = answered(model, processor)
    folder = sorted_into(tmp_path, "thing {}".format, pictures, answers)
    with pytest.raises(DataError, match="say labels_by position"):
        accuracy(model, processor, folder)
    folder_names = sorted({f"thing {answer}" for answer in answers})
    expected = np.mean([folder_names.index(f"thing {answer}") == answer for answer in answers])
    assert accuracy(model, processor, DataSource(folder, labels_by="position")) == pytest.approx(expected)


def labels(config, *, class_names=None, **options):
    return Labels(class_names, config, "data", **options)


def test_a_model_without_names_takes_classes_in_their_order():
    config = tiny_config("vit", id2label=None, num_labels=2)
    assert [labels(config, class_names=("cat", "dog"))(i) for i in (0, 1, -1)] == [0, 1, NO_LABEL]
    with pytest.raises(DataError, match=r"3 of its 3 classes cannot be told"):
        labels(config, class_names=("cat", "dog", "emu"))(0)


def test_classes_that_do_not_occur_need_no_name():
    find = labels(tiny_config("vit", **both_ways(BREEDS)), class_names=("zebra", "unicorn", "ox"))
    assert [find(0), find(2)] == [2, 4]
    with pytest.raises(DataError, match="'unicorn'"):
        find(1)


def test_a_name_of_two_classes_is_refused_when_it_is_used():
    config = tiny_config("vit", id2label={0: "crane", 1: "ox", 2: "crane", 3: "maillot", 4: "maillot, tank suit"})
    find = labels(config)
    assert [find("ox"), find("maillot"), find("tank suit")] == [1, 3, 4]
    with pytest.raises(DataError, match=r"may be class 0 \('crane'\) or class 2 \('crane'\)"):
        find("crane")
    with pytest.raises(DataError, match=r"'crane' \(may be class 0"):
        labels(config, class_names=("crane", "ox"))(0)
    # The model's own list settles it.
    own = labels(config, class_names=("crane", "ox", "crane2", "maillot", "maillot, tank suit"))
    assert [own(i) for i in range(5)] == list(range(5))


def test_numbers_are_no_indices_where_they_are_names():
    find = labels(tiny_config("vit", id2label={0: "5", 1: "7", 2: "none"}))
    assert [find("5"), find("7"), find("none")] == [0, 1, 2]
    with pytest.raises(DataError, match="label '2' is no class"):
        find("2")


@pytest.mark.parametrize("value", [0.5, -0.25, float("inf"), [1], {"a": 1}])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(DataError, match="is no class index; expected whole numbers from 0 to 6"):
        labels(tiny_config("vit"))(value)


def test_whole_numbers_in_other_forms_are_indices():
    find = labels(tiny_config("vit"))
    assert [find(v) for v in (3.0, "3.0", "03", float("nan"), None)] == [3, 3, 3, NO_LABEL, NO_LABEL]
    with pytest.raises(DataError, match="says yes or no, the model has 7 classes"):
        find(True)
    assert labels(tiny_config("vit", id2label={0: "no", 1: "yes"}))(True) == 1


WORDS = st.lists(st.text("abcdefgh", min_size=2, max_size=6), min_size=1, max_size=3)
MARKS = st.sampled_from([" ", "_", "-", "  ", ". "])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(classes=st.lists(WORDS, min_size=2, max_size=6, unique_by=tuple), mark=MARKS, data=st.data())
def test_a_spelling_finds_its_class_and_no_other(classes, mark, data):
    names = ClassNames([" ".join(words) for words in classes])
    chosen = data.draw(st.integers(0, len(classes) - 1))
    words = [data.draw(st.sampled_from([w, w.upper(), w.title()])) for w in classes[chosen]]
    assert names.find(mark.join(words)) == {chosen}
    assert names.find(" ".join([*words, "zz"])) == set()


def test_imagenets_classes_are_in_their_order():
    assert len(SYNSETS) == 1000
    assert list(SYNSETS) == sorted(SYNSETS)
    assert next(iter(SYNSETS.items())) == ("n01440764", "tench, Tinca tinca")


def test_several_labels_an_image():
    config = tiny_config("vit", problem_type=MULTI, **both_ways(BREEDS))
    expected = [0.0, 0, 1, 0, 0, 1, 0]
    find = labels(config, listed=True)
    for label in (
        [2, 5],
        [5.0, 2.0],
        ["yak", "Zebra"],
        expected,
        [bool(v) for v in expected],
        [int(v) for v in expected],
    ):
        assert find(label) == expected
    assert find([]) == [0.0] * 7
    assert labels(config, class_names=("yak", "zebra"), listed=True)([0, 1]) == expected
    for wrong in ([0.5, 0, 0, 0, 0, 0, 1], [7], [-1], ["gnu"], 3):
        with pytest.raises(DataError):
            find(wrong)
    two = tiny_config("vit", problem_type=MULTI, id2label={0: "a", 1: "b"})
    with pytest.raises(DataError, match="may be a list of classes"):
        labels(two, listed=True)([0, 1])
    assert labels(two, listed=True, fixed=2)([0, 1]) == [0.0, 1.0]


def test_numbers_for_labels():
    config = tiny_config("vit", problem_type=REGRESSION, id2label={0: "age"})
    find = labels(config)
    assert [find(v) for v in (0.5, 3, "2.5", [1.5])] == [[0.5], [3.0], [2.5], [1.5]]
    assert np.isnan(find(None)).all()
    assert labels(config, class_names=("10", "25"))(1) == [25.0]
    for wrong in ("old", [1, 2], float("inf")):
        with pytest.raises(DataError, match="the model predicts a number, so each image needs a number"):
            find(wrong)


def test_tasks_that_do_not_fit_the_model_are_refused():
    config = tiny_config("vit", id2label={0: "age"})
    config.problem_type = "single_label_classification"
    with pytest.raises(ModelError, match="the model has one output, which is no choice among classes"):
        labels(config)
    config = tiny_config("vit", problem_type="single_label_classification")
    with pytest.raises(DataError, match="the label column holds lists, not one label an image"):
        labels(config, listed=True)
    with pytest.raises(ConfigError, match="labels_by must be one of name, position, none, got 'order'"):
        DataSource("x", labels_by="order")


BROKEN = {
    "names of other classes": ["cat", "gnu"] * 8,
    "indices of a larger model": [500] * 16,
    "numbers": [0.5] * 16,
    "lists": [[[1, 2]]] * 16,
    "none of some": [0, None] * 8,
}


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(16)]


def prune(data, processor, **changes):
    plain = {"block_shape": (8, 8), "budget": {"metric": "density", "ratio": 0.5}, **changes}
    pruner = BlockPruner(tiny_model(), processor, BlockPruneConfig.from_dict(plain))
    pruner.prune(data)
    return pruner


@pytest.mark.parametrize("kind", BROKEN)
def test_what_needs_no_labels_reads_none(pictures, processor, kind):
    plain = datasets.Dataset.from_dict({"image": pictures})
    broken = datasets.Dataset.from_dict({"image": pictures, "label": BROKEN[kind]})
    alone, beside = (prune(data, processor) for data in (plain, broken))
    beside.config = beside.config.replace(recovery={"epochs": 1, "reconstruction_epochs": 0, "batch_size": 8})
    for one, other in zip(alone.model.parameters(), beside.model.parameters(), strict=True):
        assert torch.equal(one, other)
    beside.recover(broken, teacher=BlockPruner(tiny_model(), processor))
    beside.recover(DataSource(broken, label_column="nowhere"), teacher=BlockPruner(tiny_model(), processor))


def test_taylor_takes_labels_that_fit_or_none(pictures, processor):
    broken = datasets.Dataset.from_dict({"image": pictures, "label": BROKEN["names of other classes"]})
    taylor = {"method": "taylor", "refit": False}
    with pytest.raises(DataError, match="label 'cat' is no class of the model"):
        prune(broken, processor, **taylor)
    assert prune(DataSource(broken, labels_by="none"), processor, **taylor).report()["calibration"]["num_images"] == 16
    right = datasets.Dataset.from_dict({"image": pictures, "label": [f"Class_{i % 7}" for i in range(16)]})
    assert load_images(right).label_column == "label"
    assert prune(right, processor, **taylor).report()["calibration"]["num_images"] == 16
