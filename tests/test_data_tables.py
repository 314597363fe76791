"""Labels from tables and from folders of Hugging Face's datasets: every row in the part and class that it says."""

import numpy as np
import pytest
from PIL import Image

from stepping_plugin.errors import SteppingError
from stepping_plugin.runs.data import build_data
from stepping_plugin.runs.recipe_schema import DataConfig

LABELS = ["cat", "dog", "10", "9"] * 5  # in natural order: 9, 10, cat, dog
CLASSES = ("9", "10", "cat", "dog")


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(len(LABELS)):
        Image.new("RGB", (6, 6), (number * 10, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def rows(numbers, separator=",", splits=None):
    cells = [(f"pictures/{n}.png", LABELS[n], *([splits[n]] if splits else [])) for n in numbers]
    header = ("file", "label", *(["split"] if splits else []))
    return "\n".join(separator.join(line) for line in [header, *cells]) + "\n"


def opened(name, root, **keys):
    return build_data(DataConfig(name=name, root=str(root), in_memory=True, val_fraction=0.25, **keys))


def check(bundle):
    """Every picture has its own label; gives the numbers of the pictures of each part."""
    assert bundle.classes == CLASSES and bundle.num_classes == 4
    parts = [(data.images[:, 0, 0, 0] // 10, data.labels) for data in (bundle.train, bundle.val, bundle.test)]
    for numbers, labels in parts:
        assert [CLASSES[label] for label in labels.tolist()] == [LABELS[n] for n in numbers.tolist()]
    return [set(numbers.tolist()) for numbers, _ in parts]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_without_splits_is_divided_class_by_class(photos, separator):
    (photos / "labels.csv").write_text("\ufeff" + rows(range(20), separator), encoding="utf-8")
    train, val, test = check(opened("csv", photos))
    assert len(test) == 4 and len(val) == 4 and train | val | test == set(range(20)) and len(train) == 12


def test_a_column_and_separate_tables_say_which_part(photos):
    splits = ["train"] * 12 + ["val"] * 4 + ["Test"] * 4
    (photos / "labels.csv").write_text(rows(range(20), splits=splits))
    keys = {"name": "csv", "in_memory": True, "root": str(photos)}
    first = check(build_data(DataConfig(**keys)))
    assert first == [set(range(12)), set(range(12, 16)), set(range(16, 20))]
    (photos / "labels.csv").unlink()
    for name, numbers in (("train", range(12)), ("validation", range(12, 16)), ("test", range(16, 20))):
        (photos / f"{name}.csv").write_text(rows(numbers))
    assert check(build_data(DataConfig(**keys))) == first
    disk = build_data(DataConfig(name="csv", root=str(photos), img_size=6, workers=0))
    assert [label for _, labels in disk.loader("test", 3) for label in labels.tolist()] == [2, 3, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\nx,y\n", "no such column; got a,b, expected columns file and label"),
        ("", "no such column"),
        ("file,label\npictures/1.png\n", "line 2: file or label is missing"),
        ("file,label,split\npictures/1.png,cat,rest\n", "line 2: unknown split; got rest"),
        ("file,label\npictures/1.png,cat\npictures/1.png,dog\n", "listed more than once, such as pictures/1.png"),
        ("file,label\n1.png,cat\n2.png,dog\n", r"none of the files is there.*data\.root"),
        ("file,label,split\npictures/1.png,cat,test\n", "no training pictures"),
    ],
)
def test_wrong_tables_are_clear_errors(photos, text, message):
    (photos / "labels.csv").write_text(text)
    with pytest.raises(SteppingError, match=message):
        opened("csv", photos)


def test_missing_tables_and_other_columns(photos):
    with pytest.raises(SteppingError, match=r"no labels\.csv and no train\.csv"):
        opened("csv", photos)
    with pytest.raises(SteppingError, match=r"data\.labels: .*none\.csv cannot be read"):
        opened("csv", photos, labels=str(photos / "none.csv"))
    (photos / "mine.csv").write_text(rows(range(20)).replace("file,label", "path,breed"))
    check(opened("csv", photos, labels=str(photos / "mine.csv"), input_key="path", target_key="breed"))


# --- Hugging Face's datasets


@pytest.fixture(params=["class labels", "words"])
def table(request, photos):
    datasets = pytest.importorskip("datasets", reason="the optional extra datasets")
    label = datasets.ClassLabel(names=list(CLASSES)) if request.param == "class labels" else datasets.Value("string")
    features = datasets.Features({"photo": datasets.Image(), "kind": label})
    files = [str(photos / "pictures" / f"{n}.png") for n in range(20)]
    return datasets.Dataset.from_dict({"photo": files, "kind": LABELS}, features=features)


@pytest.mark.parametrize("form", ["save_to_disk", "save_to_disk with splits", "parquet"])
def test_folders_of_datasets(table, photos, form, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", photos / "cache")
    keys = {"target_key": "kind"}
    if form == "save_to_disk":
        table.save_to_disk(photos / "set")
    else:
        parts = {"train": table.select(range(16)), "test": table.select(range(16, 20))}
        if form == "parquet":
            for name, part in parts.items():
                part.to_parquet(photos / "set" / f"{name}.parquet")
        else:
            datasets.DatasetDict(parts).save_to_disk(photos / "set")
    bundle = opened("hfds", photos / "set", **keys)
    train, val, test = check(bundle)
    assert train | val | test == set(range(20)) and len(train) + len(val) + len(test) == 20
    assert form == "save_to_disk" or test == set(range(16, 20))


def test_what_is_no_folder_of_datasets_is_a_clear_error(photos, monkeypatch):
    pytest.importorskip("datasets", reason="the optional extra datasets")
    with pytest.raises(SteppingError, match=r"data\.root: no such folder"):
        opened("hfds", photos / "nowhere")
    (photos / "empty").mkdir()
    with pytest.raises(SteppingError, match="datasets cannot read it"):
        opened("hfds", photos / "empty")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(SteppingError, match=r"pip install 'stepping-plugin\[datasets\]'"):
        opened("hfds", photos)


def test_columns_of_datasets_are_found_or_asked_for(photos):
    datasets = pytest.importorskip("datasets", reason="the optional extra datasets")
    pixels = [Image.fromarray(np.full((6, 6, 3), n * 10, np.uint8)) for n in range(20)]
    made = datasets.Dataset.from_dict({"a": pixels, "b": pixels, "c": [None, *LABELS[1:]]})
    features = datasets.Features(
        {"a": datasets.Image(), "b": datasets.Image(), "c": datasets.ClassLabel(names=list(CLASSES))}
    )
    made.cast(features).save_to_disk(photos / "set")
    with pytest.raises(SteppingError, match=r"not one column of Image; got 2 in columns a, b, c.*data\.input_key"):
        opened("hfds", photos / "set")
    with pytest.raises(SteppingError, match=r"data\.input_key: no such column.*got d, expected one of a, b, c"):
        opened("hfds", photos / "set", input_key="d")
    with pytest.raises(SteppingError, match="row 0 has no label"):
        opened("hfds", photos / "set", input_key="a")


def test_sets_that_timm_opens_tell_labels_and_what_cannot_be_read(table, photos, monkeypatch):
    """timm's own access would give the next picture, with that one's label."""
    import datasets

    if not isinstance(table.features["kind"], datasets.ClassLabel):
        pytest.skip("timm needs class labels")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", photos / "cache")
    table = table.rename_columns({"photo": "image", "kind": "label"})
    table = table.cast_column("image", datasets.Image(decode=False))
    content = [(photos / "pictures" / f"{n}.png").read_bytes() if n != 3 else b"no picture" for n in range(20)]
    images = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(content)]
    table = datasets.Dataset.from_dict({"image": images, "label": list(table["label"])}, features=table.features)
    table.to_parquet(photos / "set" / "train.parquet")
    table.to_parquet(photos / "set" / "validation.parquet")
    cfg = DataConfig(
        name=f"hfds/{photos / 'set'}", root=str(photos / "cache"), img_size=6, workers=0, balance="sampler"
    )
    bundle = build_data(cfg)
    assert bundle.classes == CLASSES and len(bundle.val) == 4
    found = [label for _, labels in bundle.loader("test", 4) for label in labels.tolist()]
    assert found == [CLASSES.index(label) for n, label in enumerate(LABELS) if n != 3]
    assert [name.rpartition("/")[2] for name in bundle.left_out.names] == ["3.png"]
