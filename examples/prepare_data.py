"""Write the data of the examples into examples/data/, in forms that `slimtune train` reads.

    python examples/prepare_data.py FOLDER [names ...]

FOLDER holds (each example needs its own part only):

    glue/{rte,cola,sst2,stsb}/{train,dev,test}.jsonl.gz     senteval/trec/{train,test}.jsonl.gz
    lm_text/tinyshakespeare.txt.gz                          cifar10/cifar10_jpeg_full.npz
    mnist/mnist_20k_5k.npz
    lm_text/tinystories_sample.txt.gz                       weights/{babyllama105_llama,stories260k_llama}/
    weights/resnet20_cifar10.safetensors

GLUE's own test labels are not public: RTE and CoLA are tested on the official dev set and validated on a tenth of the
training data, which `slimtune train` holds out. SST-2 and STS-B keep their official splits. The CIFAR-10 test images
are divided into validation (2,500) and test (7,500); training takes 1,000 images of each class.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "data"
TREC = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
ENTAILMENT = ["entailment", "not_entailment"]
TRAIN_SHARE, VALIDATION_SHARE = 0.9, 0.05  # of texts, in their order


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def glue(data: Path, name: str, splits: dict[str, str], columns: tuple[str, ...], names: list[str] | None) -> None:
    """`splits` maps the written split to the file it is read from; labels become names where there are names."""
    for split, file in splits.items():
        rows = read_rows(data / f"{file}.jsonl.gz")
        for row in rows:
            row["label"] = names[row["label"]] if names else row["label"]
        write_rows(OUT / name / f"{split}.jsonl", ({key: row[key] for key in (*columns, "label")} for row in rows))


def rte(data: Path) -> None:
    glue(data / "glue/rte", "rte", {"train": "train", "test": "dev"}, ("sentence1", "sentence2"), ENTAILMENT)


def cola(data: Path) -> None:
    names = ["unacceptable", "acceptable"]
    glue(data / "glue/cola", "cola", {"train": "train", "test": "dev"}, ("sentence",), names)


def sst2(data: Path) -> None:
    splits = {"train": "train", "validation": "dev", "test": "test"}
    glue(data / "glue/sst2", "sst2", splits, ("sentence",), ["negative", "positive"])


def stsb(data: Path) -> None:
    splits = {"train": "train", "validation": "dev", "test": "test"}
    glue(data / "glue/stsb", "stsb", splits, ("sentence1", "sentence2"), None)


def trec(data: Path) -> None:
    glue(data / "senteval/trec", "trec", {"train": "train", "test": "test"}, ("text",), TREC)


def shakespeare(data: Path) -> None:
    """Running text, one row per split; the model that is adapted beside it."""
    with gzip.open(data / "lm_text/tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    first, second = (int(share * len(text)) for share in (TRAIN_SHARE, TRAIN_SHARE + VALIDATION_SHARE))
    for split, part in (("train", text[:first]), ("validation", text[first:second]), ("test", text[second:])):
        write_rows(OUT / "shakespeare" / f"{split}.jsonl", [{"text": part}])
    copy_folder(data / "weights/babyllama105_llama", OUT / "babyllama105")


def tinystories(data: Path) -> None:
    """Stories, one a row, in the order of the file; the two models that were trained on such stories."""
    with gzip.open(data / "lm_text/tinystories_sample.txt.gz", "rt", encoding="utf-8") as file:
        stories = [" ".join(story.split()) for story in file.read().split("<|endoftext|>")]
    rows = [{"text": story} for story in stories if story]
    first, second = (int(share * len(rows)) for share in (TRAIN_SHARE, TRAIN_SHARE + VALIDATION_SHARE))
    for split, part in (("train", rows[:first]), ("validation", rows[first:second]), ("test", rows[second:])):
        write_rows(OUT / "tinystories" / f"{split}.jsonl", part)
    for name in ("babyllama105", "stories260k"):
        copy_folder(data / f"weights/{name}_llama", OUT / name)


def copy_folder(source: Path, out: Path) -> None:
    out.mkdir(exist_ok=True, parents=True)
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, out / file.name)


def jpeg_cifar(data: Path) -> None:
    """Decoded JPEG images as uint8 (N, 32, 32, 3); the weights trained on the lossless ones beside them."""
    import numpy as np
    from PIL import Image

    with np.load(data / "cifar10/cifar10_jpeg_full.npz") as archive:
        stored = {key: archive[key] for key in archive.files}

    def decode(split: str, rows: Any) -> Any:
        starts, jpeg = stored[f"{split}_offsets"], stored[f"{split}_jpeg"]
        files = (io.BytesIO(jpeg[starts[i] : starts[i + 1]].tobytes()) for i in rows)
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])

    def first_of_each(labels: Any, count: int) -> Any:
        return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))

    train_labels, test_labels = stored["train_labels"], stored["test_labels"]
    train = first_of_each(train_labels, 1000)
    validation = first_of_each(test_labels, 250)
    test = np.setdiff1d(np.arange(len(test_labels)), validation)
    OUT.mkdir(parents=True, exist_ok=True)
    np.savez(
        OUT / "jpeg_cifar.npz",
        train_images=decode("train", train),
        train_labels=train_labels[train],
        validation_images=decode("test", validation),
        validation_labels=test_labels[validation],
        test_images=decode("test", test),
        test_labels=test_labels[test],
    )
    for name in ("resnet20_cifar10.safetensors", "resnet56_cifar10.safetensors"):
        shutil.copyfile(data / "weights" / name, OUT / name)


def mnist(data: Path) -> None:
    """20,000 training and 5,000 test images, uint8 (N, 28, 28), as they are."""
    OUT.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / "mnist/mnist_20k_5k.npz", OUT / "mnist.npz")


EXAMPLES: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (rte, cola, sst2, stsb, trec, shakespeare, tinystories, jpeg_cifar, mnist)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXAMPLES)}; default: all")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(EXAMPLES)):
        parser.error(f"no example '{unknown[0]}'; there are {', '.join(EXAMPLES)}")
    for name in arguments.names or EXAMPLES:
        try:
            EXAMPLES[name](arguments.folder)
        except FileNotFoundError as error:
            parser.error(f"{name}: {error.filename} is missing")
        print(f"{name}: written to {OUT}")


if __name__ == "__main__":
    main()
