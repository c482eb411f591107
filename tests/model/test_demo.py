"""The embedded task: reproducible, well formed, hard to solve by counting words and learnable by its encoder."""

import random
import shutil
import statistics
from collections import deque
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from model import demo
from model.demo import DemoTask, build_demo, make_reviews

BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, EPOCHS = 32, 1e-3, 40, 3


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> DemoTask:
    return build_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def tokenizer(task: DemoTask) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(task.model)


def read_split(task: DemoTask, split: str) -> tuple[list[str], list[int]]:
    columns = pq.read_table(task.dataset / f"{split}.parquet").to_pydict()
    return columns["text"], columns["label"]


@pytest.fixture(scope="module")
def bag_of_words_accuracy(task: DemoTask) -> float:
    train_texts, train_labels = read_split(task, "train")
    texts, labels = read_split(task, "validation")
    counts = CountVectorizer().fit(train_texts)
    classifier = LogisticRegression(max_iter=2000).fit(counts.transform(train_texts), train_labels)
    return float(classifier.score(counts.transform(texts), labels))


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_whoever_may_read_one_file_may_read_all(task):
    folder = task.model.parent
    modes = {file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
    assert modes == {(folder / "demo.json").stat().st_mode}


def test_a_seed_decides_the_reviews():
    assert make_reviews(40, seed=3) == make_reviews(40, seed=3)
    assert make_reviews(40, seed=3) != make_reviews(40, seed=4)


def test_a_larger_count_only_appends():
    texts, labels = make_reviews(31, seed=3)
    more_texts, more_labels = make_reviews(60, seed=3)
    assert (more_texts[:31], more_labels[:31]) == (texts, labels)
    assert len(more_texts) == len(more_labels) == 60


def test_no_reviews_cannot_be_asked_for():
    with pytest.raises(ValueError, match="count=0"):
        make_reviews(0, seed=3)


def test_reviews_have_20_to_120_words_over_the_whole_range():
    lengths = [len(text.split()) for text in make_reviews(2000, seed=5)[0]]
    assert min(lengths) >= 20
    assert max(lengths) <= 120
    assert 60 <= statistics.mean(lengths) <= 75
    assert all(any(low <= length < low + 10 for length in lengths) for low in range(20, 120, 10))


def test_labels_are_balanced_in_every_even_count():
    labels = make_reviews(500, seed=5)[1]
    assert all(sum(labels[:count]) == count // 2 for count in range(2, 501, 2))


def test_no_text_is_in_both_splits_or_twice(task):
    texts = read_split(task, "train")[0] + read_split(task, "validation")[0]
    assert len(texts) == demo.TRAIN_REVIEWS + demo.VALIDATION_REVIEWS
    assert len(set(texts)) == len(texts)


def test_a_seed_decides_every_file(task, tmp_path):
    again = build_demo(tmp_path / "again")
    assert file_contents(again.model) == file_contents(task.model)
    assert file_contents(again.dataset) == file_contents(task.dataset)


@pytest.fixture
def own_task(task, tmp_path) -> DemoTask:
    """A copy of the task, at the test's own `tmp_path`."""
    shutil.copytree(task.model.parent, tmp_path, dirs_exist_ok=True)
    return DemoTask(model=tmp_path / "model", dataset=tmp_path / "dataset")


def test_another_seed_replaces_the_folder(own_task, tmp_path):
    before = file_contents(tmp_path)
    assert build_demo(tmp_path, seed=1) == own_task
    after = file_contents(tmp_path)
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert {"dataset/train.parquet", "dataset/validation.parquet", "model/model.safetensors"} <= changed


def test_a_complete_folder_is_reused(task, monkeypatch):
    monkeypatch.setattr(demo, "make_reviews", lambda *_: pytest.fail("generated again"))
    before = file_contents(task.model.parent)
    assert build_demo(task.model.parent) == task
    assert file_contents(task.model.parent) == before


@pytest.mark.parametrize("lost", ["demo.json", "model/model.safetensors", "dataset/validation.parquet"])
@pytest.mark.usefixtures("own_task")
def test_an_incomplete_folder_is_rebuilt(tmp_path, lost):
    complete = file_contents(tmp_path)
    (tmp_path / lost).unlink()
    build_demo(tmp_path)
    assert file_contents(tmp_path) == complete


def test_an_interrupted_build_is_taken_up_by_the_next(task, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_make_encoder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_demo(tmp_path)
    assert not (tmp_path / "demo.json").exists()
    build_demo(tmp_path)
    assert file_contents(tmp_path) == file_contents(task.model.parent)


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build_demo(tmp_path)
    torch.testing.assert_close(torch.rand(3), expected)


def test_reviews_survive_the_tokenizer(task, tokenizer):
    texts = read_split(task, "validation")[0]
    encoded = tokenizer(texts)["input_ids"]
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    assert max(map(len, encoded)) <= tokenizer.model_max_length
    decoded = tokenizer.decode(encoded[0], skip_special_tokens=True)
    assert decoded.replace(" ", "") == texts[0].lower().replace(" ", "")


def test_names_and_unseen_words_split_into_pieces(tokenizer):
    assert tokenizer.tokenize("Kesnell was dull.") == ["kes", "##nell", "was", "dull", "."]
    assert tokenizer.tokenize("zebra?") == ["z", "##e", "##b", "##r", "##a", "?"]


def test_counting_words_is_not_enough(bag_of_words_accuracy):
    assert 0.6 <= bag_of_words_accuracy <= 0.8


def test_the_encoder_learns_what_counting_words_cannot(task, tokenizer, bag_of_words_accuracy):
    accuracy = train_and_score(task, tokenizer)
    assert accuracy >= 0.9
    assert accuracy >= bag_of_words_accuracy + 0.1


def train_and_score(task: DemoTask, tokenizer: PreTrainedTokenizerBase) -> float:
    """Validation accuracy after plain training on batches of similar length, until the training reviews are learned."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model = AutoModelForSequenceClassification.from_pretrained(task.model)
    texts, labels = read_split(task, "train")
    encoded = tokenizer(texts)["input_ids"]
    by_length = sorted(range(len(texts)), key=lambda index: (len(encoded[index]), rng.random()))
    batches = [by_length[start : start + BATCH_SIZE] for start in range(0, len(by_length), BATCH_SIZE)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    recent: deque[float] = deque([0.0] * 40, maxlen=40)  # accuracy on the latest batches, before each was learned
    for batch in (batch for _ in range(EPOCHS) for batch in rng.sample(batches, len(batches))):
        inputs = tokenizer.pad({"input_ids": [encoded[index] for index in batch]}, return_tensors="pt")
        logits, wanted = model(**inputs).logits, torch.tensor([labels[index] for index in batch])
        F.cross_entropy(logits, wanted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append((logits.argmax(dim=1) == wanted).float().mean().item())
        if statistics.mean(recent) >= 0.95:
            break
    texts, labels = read_split(task, "validation")
    with torch.inference_mode():
        predicted = [
            label
            for start in range(0, len(texts), 100)
            for label in model(**tokenizer(texts[start : start + 100], padding=True, return_tensors="pt"))
            .logits.argmax(dim=1)
            .tolist()
        ]
    return sum(map(int.__eq__, predicted, labels)) / len(labels)
