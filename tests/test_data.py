"""Files, columns, labels and splits: what is read, and what is refused with which words."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from slimtune.app.config import TrainConfig
from slimtune.app.data import Splits, hold_out, load_splits, open_dataset, read_labels, read_numbers, shuffled
from slimtune.app.tables import read_table
from slimtune.errors import DataError

ROWS = [{"text": f'row {i}, with a "quote" and é', "label": "ab"[i % 2]} for i in range(20)]


def config(**fields):
    return TrainConfig(**{"task": "classify", "model_factory": "m:f", "output_dir": "unused", **fields})


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(action, *words):
    with pytest.raises(DataError) as error:
        action()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def write(path, rows):
    import pyarrow as pa
    from pyarrow import parquet

    plain = path.with_suffix("") if path.suffix == ".gz" else path
    match plain.suffix:
        case ".jsonl":
            text = "".join(json.dumps(row) + "\n\n" for row in rows)
        case ".json":
            text = json.dumps(rows, indent=1)
        case ".csv":
            cells = [["text", "label"], *([row["text"].replace('"', '""'), row["label"]] for row in rows)]
            text = "".join(f'"{a}","{b}"\r\n' for a, b in cells)
        case ".tsv":
            text = "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
        case ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows), plain)
            text = None
    data = plain.read_bytes() if text is None else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix, zipped):
    table = read_table(write(tmp_path / f"data.{suffix}{zipped}", ROWS))
    assert [table.row(i) for i in range(len(table))] == ROWS


def test_json_of_columns_and_json_that_is_jsonl(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": ["x", "y"], "label": [0, 1]}))
    assert read_table(tmp_path / "a.json").column("label") == [0, 1]
    assert len(read_table(jsonl(tmp_path / "b.json", ROWS))) == 20


def test_text_lines_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n  two\n".encode())
    table = read_table(tmp_path / "a.txt")
    assert table.column("text") == ["one", "  two"]
    assert table.where(1) == f"{tmp_path / 'a.txt'}:3"


def test_csv_line_numbers_survive_multiline_cells(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",x\n\nthree,y\n')
    table = read_table(tmp_path / "a.csv")
    assert table.column("text") == ["one\ntwo", "three"]
    assert [table.where(i).rsplit(":")[-1] for i in (0, 1)] == ["2", "5"]


def test_several_files_by_pattern(tmp_path):
    jsonl(tmp_path / "b.jsonl", ROWS[:3])
    jsonl(tmp_path / "a.jsonl", ROWS[3:5])
    table = open_dataset(str(tmp_path / "*.jsonl"))["train"]
    assert table.column("text") == [row["text"] for row in ROWS[3:5] + ROWS[:3]]
    assert table.where(2) == f"{tmp_path / 'b.jsonl'}:1"
    refused(lambda: open_dataset(str(tmp_path / "*.csv")), "matches no file")
    jsonl(tmp_path / "c.jsonl", [{"text": "x", "extra": 1}])
    refused(lambda: open_dataset(str(tmp_path / "*.jsonl")), "c.jsonl", "extra")


def test_folder_with_splits(tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "test-00000.jsonl"):
        jsonl(tmp_path / name, ROWS)
    (tmp_path / "README.md").write_text("-")
    found = open_dataset(str(tmp_path))
    assert sorted(found) == ["test", "train", "validation"]
    splits = load_splits(config(dataset_name=str(tmp_path)))
    assert [len(table) for _, table in splits.items()] == [20, 20, 20]


def test_saved_datasets_folder_names_its_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 1, 0]}, features=features)
    hidden = datasets.Dataset.from_dict({"text": ["e"], "label": [-1]}, features=features)
    datasets.DatasetDict({"train": data, "validation": data, "test": hidden}).save_to_disk(str(tmp_path / "d"))
    splits = load_splits(config(dataset_name=str(tmp_path / "d")))
    assert splits.test is None
    assert "hidden labels" in splits.notes[0]
    assert read_labels(splits)[0] == ["no", "yes"]


def test_saved_datasets_folder_with_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    from slimtune.app.tasks.pixels import Pixels

    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    pictures = [Image.new("RGB", (4, 4), (i, 0, 9)) for i in range(6)]
    data = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 3}, features=features)
    data.save_to_disk(str(tmp_path / "d"))
    splits = load_splits(config(task="image-classify", dataset_name=str(tmp_path / "d"), validation_fraction=0.4))
    pixels = Pixels(splits.train, splits.columns["image"], splits.train.column("label"))
    rows = splits.train.index
    assert [pixels[i][0][0, 0].tolist() for i in range(len(pixels))] == [[i, 0, 9] for i in rows]


def test_npz(tmp_path):
    images, labels = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 3
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    splits = load_splits(config(task="image-classify", dataset_name=str(tmp_path / "a.npz"), validation_fraction=0.5))
    assert [(name, len(table)) for name, table in splits.items()] == [("train", 3), ("validation", 3), ("test", 6)]
    np.savez(tmp_path / "grey.npz", images=images[..., 0], labels=labels)
    assert open_dataset(str(tmp_path / "grey.npz"))["train"].columns["image"].shape == (6, 4, 4, 1)
    for arrays, word in (
        ({"images": images}, "no array 'labels'"),
        ({"images": images / 2, "labels": labels}, "float64"),
        ({"images": images, "labels": labels[:5]}, "expected 6 integers"),
        ({"pictures": images}, "pictures"),
        ({"images": images, "labels": np.array([{}] * 6, object)}, "plain arrays"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        refused(lambda: open_dataset(str(tmp_path / "bad.npz")), "bad.npz", word)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not a zip")
    refused(lambda: open_dataset(str(tmp_path / "bad.npz")), "bad.npz")


def test_image_folder(tmp_path):
    from PIL import Image

    for name in ("cat/1.png", "cat/2.jpg", "dog/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    table = open_dataset(str(tmp_path))["train"]
    assert table.column("label") == ["cat", "cat", "dog"]
    (tmp_path / "eel").mkdir()
    refused(lambda: open_dataset(str(tmp_path)), "eel", "without images")


# ---------------------------------------------------------------- damaged and missing


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["a.jsonl:2", "not a JSON value"]),
        ("a.jsonl", b'{"text": "x"}\n[1, 2]\n', ["a.jsonl:2", "found list"]),
        ("a.jsonl", b'{"text": "x", "text": "y"}\n', ["a.jsonl:1", "'text' appears twice"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', ["a.jsonl:2", "not UTF-8", "0xe9"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl:1", "not a JSON value"]),
        ("a.jsonl", b"", ["a.jsonl", "empty"]),
        ("a.jsonl", b"\n\n", ["a.jsonl", "no rows"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20], ["a.jsonl.gz", "damaged gzip"]),
        ("a.jsonl.gz", b"plain text", ["a.jsonl.gz", "damaged gzip"]),
        ("a.json", b"3", ["a.json", "expected a list of objects"]),
        ("a.json", b'{"a": [1], "b": [1, 2]}', ["a.json", "different lengths"]),
        ("a.csv", b"text,label,text\n1,2,3\n", ["a.csv:1", "'text' appears twice"]),
        ("a.csv", b"text,label\nx,y\nx\n", ["a.csv:3", "1 fields where the header has 2"]),
        ("a.csv", b'text,label\n"x,y\n', ["a.csv:2"]),
        ("a.csv", b"text,label\n", ["a.csv", "no rows"]),
        ("a.tsv", b"text\tlabel\nx\ty\tz\n", ["a.tsv:2", "3 fields"]),
        ("a.parquet", b"PAR1 and then nothing", ["a.parquet", "Parquet"]),
        ("a.pkl", b"x", ["a.pkl", "'.pkl'", ".jsonl"]),
    ],
)
def test_damaged_files_are_refused_with_their_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    refused(lambda: open_dataset(str(tmp_path / name)), *words)


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    refused(lambda: open_dataset(str(tmp_path / "trian.jsonl")), "trian.jsonl", "did you mean 'train.jsonl'")
    (tmp_path / "empty").mkdir()
    refused(lambda: open_dataset(str(tmp_path / "empty")), "empty", "nothing readable")


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    from slimtune.app import data

    class Hub:
        @staticmethod
        def load_dataset(name, config):
            raise ConnectionError("offline\nlong story")

    monkeypatch.setattr(data, "_datasets", lambda: Hub)
    refused(lambda: open_dataset("someone/something"), "someone/something", "not readable from the hub (offline)")


# ---------------------------------------------------------------- columns


def test_missing_columns_are_named_with_those_there_are(tmp_path):
    path = str(jsonl(tmp_path / "train.jsonl", ROWS))
    refused(
        lambda: load_splits(config(dataset_name=path, text_column="texts")),
        "train.jsonl: no column 'texts' (text_column)",
        "columns: text, label",
        "did you mean 'text'?",
    )
    other = str(jsonl(tmp_path / "dev.jsonl", [{"text": "x"}]))
    refused(lambda: load_splits(config(dataset_name=path, eval_dataset_name=other)), "dev.jsonl", "'label'")
    odd = str(jsonl(tmp_path / "odd.jsonl", [{"a": "x", "label": 1}]))
    refused(lambda: load_splits(config(dataset_name=odd)), "none of the usual columns", "set text_column")


def test_pairs_are_found_unless_the_text_column_is_named(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": i % 2} for i in range(20)]
    path = str(jsonl(tmp_path / "a.jsonl", rows))
    assert load_splits(config(dataset_name=path)).columns["pair"] == "sentence2"
    assert "pair" not in load_splits(config(dataset_name=path, text_column="sentence1")).columns


# ---------------------------------------------------------------- labels


def labelled(tmp_path, train, validation=None, classes=None):
    def table(name, values):
        found = read_table(jsonl(tmp_path / name, [{"text": "t", "label": v} for v in values]))
        found.classes.update({"label": classes} if classes else {})
        return found

    return Splits(
        table("train.jsonl", train),
        table("dev.jsonl", train if validation is None else validation),
        None,
        {"label": "label"},
    )


@pytest.mark.parametrize(
    ("values", "given", "names", "numbers"),
    [
        (["b", "a", "b"], None, ["a", "b"], [1, 0, 1]),
        ([2, 0, 1], None, ["0", "1", "2"], [2, 0, 1]),
        ([0, 2], None, ["0", "1", "2"], [0, 2]),
        ([5, -1], None, ["-1", "5"], [1, 0]),
        (["10", "9"], None, ["9", "10"], [1, 0]),
        ([True, False], None, ["False", "True"], [1, 0]),
        ([1.0, 0.0], None, ["0", "1"], [1, 0]),
        (["b", "a"], ["b", "a", "c"], ["b", "a", "c"], [0, 1]),
        ([0, 1], ["no", "yes"], ["no", "yes"], [0, 1]),
        ([10, 20], ["20", "10"], ["20", "10"], [1, 0]),
    ],
)
def test_labels_become_numbers(tmp_path, values, given, names, numbers):
    found, encoded = read_labels(labelled(tmp_path, values), given)
    assert (found, encoded["train"]) == (names, numbers)


def test_classes_are_those_of_the_whole_training_data(tmp_path):
    splits = labelled(tmp_path, ["b", "1", "a", "c"], ["b", "c"])
    sampled = replace(splits, train=splits.train.select([2, 3]))
    assert read_labels(sampled) == (["1", "a", "b", "c"], {"train": [1, 3], "validation": [2, 3]})
    numeral = replace(splits, train=splits.train.select([1]))
    assert read_labels(numeral)[1]["train"] == [0]  # one numeral among names is a name


def test_bad_labels_are_refused_with_their_row(tmp_path):
    refused(lambda: read_labels(labelled(tmp_path, ["a", "b"], ["a", "c"])), "dev.jsonl:2", "'c'", "a, b")
    refused(lambda: read_labels(labelled(tmp_path, [0, 1, 2]), ["no", "yes"]), "train.jsonl:3", "2 is outside")
    refused(lambda: read_labels(labelled(tmp_path, ["a", None])), "train.jsonl:2", "nothing")
    refused(lambda: read_labels(labelled(tmp_path, ["a", ""])), "train.jsonl:2")
    refused(lambda: read_labels(labelled(tmp_path, ["a", ["b"]])), "train.jsonl:2", "['b']")
    refused(lambda: read_labels(labelled(tmp_path, [0.5, 1.5])), "train.jsonl:1", "task: regress")
    refused(lambda: read_labels(labelled(tmp_path, ["a", 1])), "mixes text and numbers")
    refused(lambda: read_labels(labelled(tmp_path, ["a", "a"])), "single value")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "high", True, [1]])
def test_numbers_must_be_finite(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"y": "1.5"}) + "\n" + json.dumps({"y": value}) + "\n")
    table = read_table(tmp_path / "a.jsonl")
    refused(lambda: read_numbers(table, "y"), "a.jsonl:2", "finite number")
    assert read_numbers(table.select([0]), "y") == [1.5]


# ---------------------------------------------------------------- splitting


def test_the_order_is_the_same_everywhere():
    assert shuffled(10, 42, "split") == [9, 4, 0, 6, 8, 1, 2, 7, 3, 5]


def test_held_out_rows_are_stratified_disjoint_and_repeatable():
    strata = [0] * 80 + [1] * 20
    kept, held = hold_out(100, 0.1, 7, strata)
    assert sorted(kept + held) == list(range(100))
    assert [sum(strata[i] == c for i in held) for c in (0, 1)] == [8, 2]
    assert hold_out(100, 0.1, 7, strata) == (kept, held)
    assert hold_out(100, 0.1, 8, strata) != (kept, held)
    assert hold_out(5, 0.01, 0)[1] != []
    assert hold_out(1, 0.5, 0) == ([0], [])


def test_split_follows_the_seeds_and_comes_before_the_cap(tmp_path):
    path = str(jsonl(tmp_path / "a.jsonl", [{"text": str(i), "label": i % 2} for i in range(200)]))

    def validation(**fields):
        splits = load_splits(config(dataset_name=path, **fields))
        assert not set(splits.train.column("text")) & set(splits.validation.column("text"))
        return splits.validation.column("text")

    assert validation(seed=1) == validation(seed=1, max_train_samples=7) == validation(seed=5, data_seed=1)
    assert validation(seed=1) != validation(seed=2)
    assert len(validation(max_eval_samples=3)) == 3
    assert len(load_splits(config(dataset_name=path, max_train_samples=7)).train) == 7


def test_too_few_rows_to_split(tmp_path):
    path = str(jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 1}]))
    refused(lambda: load_splits(config(dataset_name=path)), "a.jsonl", "1 rows cannot be split")


# ---------------------------------------------------------------- real data

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL = {  # folder -> (rows of each split, number of classes or None for numbers)
    "glue/rte": ((2490, 277), 2),
    "glue/cola": ((8551, 1043), 2),
    "glue/sst2": ((67349, 872, 1821), 2),
    "glue/stsb": ((5749, 1500, 1379), None),
    "senteval/trec": ((4906, 546, 500), 6),
    "senteval/subj": ((8104, 901, 995), 2),
    "senteval/mr": ((8615, 958, 1089), 2),
}


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize("name", REAL)
def test_real_text_data(name):
    rows, classes = REAL[name]
    task = "classify" if classes else "regress"
    splits = load_splits(config(task=task, dataset_name=str(SHARED / name)))
    assert tuple(len(table) for _, table in splits.items()) == rows
    if classes is None:
        assert 0 <= min(read_numbers(splits.train, "label")) < max(read_numbers(splits.train, "label")) <= 5
        assert splits.columns["pair"] == "sentence2"
    else:
        names, numbers = read_labels(splits)
        assert len(names) == classes
        assert set(numbers["train"]) == set(numbers["validation"]) == set(range(classes))


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the repository")
def test_real_images():
    splits = load_splits(config(task="image-classify", dataset_name=str(SHARED / "mnist" / "mnist_20k_5k.npz")))
    assert [len(table) for _, table in splits.items()] == [18000, 2000, 5000]
    assert splits.train.columns["image"].shape == (20000, 28, 28, 1)
    _, numbers = read_labels(splits)
    share = [numbers["validation"].count(i) / numbers["train"].count(i) for i in range(10)]
    assert max(share) - min(share) < 0.001


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("gsm8k/train.jsonl.gz", ("question", "answer")),
        ("commonsense/test.jsonl.gz", ("instruction", "output")),
        ("sft_demo/alpaca_en_demo.jsonl.gz", ("instruction", "output")),
        ("lm_text/tinyshakespeare.txt.gz", ("text",)),
        ("mbpp/train.jsonl.gz", ("text",)),
    ],
)
def test_real_training_text(name, form):
    from slimtune.app.tasks.chat import form_of, read_samples

    table = open_dataset(str(SHARED / name))["train"]
    assert form_of(table, None) == form
    samples = read_samples(table, form, SimpleNamespace(chat_template=None, eos_token="</s>"))
    assert all(s.spans is None or s.spans[0][0] < s.spans[0][1] for s in samples)
