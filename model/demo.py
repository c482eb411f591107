"""The embedded task: film reviews generated from a seed and a tiny BERT that has not learned anything yet.

A review's label is what most of the writer's own verdicts on the film say. A verdict is stated, denied ("to me it is
never dull"), given by agreeing or disagreeing with somebody else, or set against another opinion ("The critics found
it superb, but ..."). Every adjective appears on both sides of these constructions, so counting words says little. The
other sentences retell the plot or the evening and say nothing about the label. Some reviews are easy on purpose: an
encoder with random weights learns the words from those, and then the constructions from the others. Reviews with
several verdicts need more tokens than those with one, so quality falls step by step as tokens are dropped.
"""

import json
import logging
import random
import string
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from model.modes import as_the_umask_says

logger = logging.getLogger(__name__)

LABELS = ("negative", "positive")
MIN_WORDS, MAX_WORDS = 20, 120
TRAIN_REVIEWS, VALIDATION_REVIEWS = 6000, 1500
MAX_TOKENS = 192
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
RECIPE_VERSION = 1  # raise it when texts or weights of a seed change, so that old folders are rebuilt
DATASET_FILES = ("train.parquet", "validation.parquet")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# By label. The same adjectives serve every speaker and every construction.
ADJECTIVES = (
    ("boring", "dull", "awful", "terrible", "weak", "tedious", "clumsy", "shallow", "dreadful", "lifeless"),
    ("brilliant", "superb", "wonderful", "gripping", "charming", "moving", "clever", "funny", "fine", "delightful"),
)
FEELINGS = (
    ("I hated it", "I regret seeing it", "I left disappointed"),
    ("I loved it", "I will see it again", "I left happy"),
)
STATED = ("I find it {}", "this film is {}", "to me it is {}", "I call it {}", "for me it was {}")
DENIED = (
    "I find it not {}",
    "this film is not {}",
    "to me it is never {}",
    "I call it hardly {}",
    "for me it was never {}",
)
REPORTED = ("{who} found it {}", "{who} called it {}", "to {who} it was {}", "for {who} it seemed {}")
AGREED = ("{}, and I agree", "{}, and that is right", "I agree that {}")
DISAGREED = ("{}, but I disagree", "{}, but that is wrong", "I disagree that {}")
CONTRASTS = ("{other}, but {own}", "although {other}, {own}", "{own}, although {other}", "{own}, even if {other}")
WHO = ("the critics", "my brother", "my sister", "the newspaper", "our neighbour", "the man beside us", "the jury")
SLOTS = {
    "hero": (
        "a retired teacher", "a young doctor", "a lonely widow", "an old fisherman", "a village priest",
        "a travelling salesman", "a night nurse", "the son of a baker", "a former soldier", "a piano tuner",
        "an unlucky gambler", "a student from the north",
    ),
    "deed": (
        "returns to the house by the sea", "opens a small hotel", "looks for a lost letter", "buys a broken boat",
        "moves into an empty flat", "finds a box of photographs", "crosses the border at night", "inherits a farm",
        "takes the last train south", "hides a stranger in the barn", "writes to a lost friend",
        "sells the family shop",
    ),
    "place": (
        "in a mountain village", "near the harbour", "on an island in the north", "in the suburbs of a large city",
        "at the edge of a forest", "in a quiet border town", "beside a wide river", "in the old quarter",
    ),
    "time": (
        "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday", "on Saturday", "on Sunday", "last night",
        "last week", "in the afternoon", "after work", "before dinner",
    ),
    "row": ("first", "second", "third", "fourth", "fifth", "sixth", "back", "middle"),
    "thing": ("ticket", "umbrella", "coat", "key", "phone", "scarf", "hat", "glove"),
    "drink": ("tea", "coffee", "lemonade", "water", "apple juice", "hot chocolate"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "thirty"),
}  # fmt: skip
NEUTRAL = (
    "The story follows {hero} who {deed} {place}.",
    "It begins {place}, where {hero} {deed}.",
    "Then {hero} {deed}, and {number} years pass.",
    "Later {hero} {deed}.",
    "In the second half {hero} {deed} {place}.",
    "{name} plays {hero}, and {name} plays {hero}.",
    "The director is {name}, who was born {place}.",
    "The script was written by {name} in {number} weeks.",
    "{name} wrote the music and {name} held the camera.",
    "It was filmed {place} within {number} months.",
    "We went to the cinema {time} with {number} friends.",
    "We sat in the {row} row with {number} other people.",
    "I forgot my {thing} at home and went back {time}.",
    "It rained {time} and the street was full of cars.",
    "I drank {drink} during the break.",
    "The bus home left {number} minutes later.",
    "The ticket cost {number} coins and the {drink} cost {number}.",
    "The film runs for two hours and {number} minutes.",
    "Somebody behind us lost a brown {thing} {time}.",
    "Snow fell {place}, and the {row} show began {number} minutes late.",
)
NAME_STARTS = ("Mar", "Kes", "Bel", "Tor", "Lin", "Had", "Ros", "Van", "Per", "Ost", "Fen", "Gal", "Dre", "Win")
NAME_ENDS = (
    "low",
    "trin",
    "mont",
    "vik",
    "dale",
    "berg",
    "ska",
    "worth",
    "nell",
    "rade",
    "shaw",
    "lund",
    "esco",
    "ton",
)


def _clause(rng: random.Random, templates: Sequence[str], label: int, adjectives: int = 1) -> str:
    """One clause with adjectives of `label`, e.g. "I find it dull and weak"."""
    *others, last = rng.sample(ADJECTIVES[label], adjectives)
    listed = f"{', '.join(others)} and {last}" if others else last
    return rng.choice(templates).replace("{who}", rng.choice(WHO)).replace("{}", listed)


def _stated(rng: random.Random, label: int) -> str:
    """A plain statement, or one that denies the opposite."""
    denied = rng.random() < 0.5
    return _clause(rng, DENIED, 1 - label) if denied else _clause(rng, STATED, label)


def _on_others(rng: random.Random, label: int) -> str:
    """Agreement with somebody who shares the verdict, or disagreement with somebody who does not."""
    agreed = rng.random() < 0.5
    opinion = _clause(rng, REPORTED, label if agreed else 1 - label)
    return rng.choice(AGREED if agreed else DISAGREED).format(opinion)


def _contrasted(rng: random.Random, label: int) -> str:
    """The writer's verdict beside somebody else's, which does not count."""
    own, other = _clause(rng, STATED, label), _clause(rng, REPORTED, 1 - label)
    return rng.choice(CONTRASTS).format(own=own, other=other)


# Each way to state one verdict, with its share.
KINDS: tuple[tuple[Callable[[random.Random, int], str], float], ...] = (
    (_stated, 0.55),
    (_on_others, 0.4),
    (_contrasted, 0.05),
)
# How many verdicts agree with the label and how many do not, with the share of the reviews that are not easy.
VOTES = (((1, 0), 0.74), ((3, 0), 0.14), ((2, 1), 0.08), ((4, 1), 0.04))
EASY_SHARE = 0.4


def _verdicts(rng: random.Random, label: int) -> list[str]:
    """The sentences that decide: the label is what most of the writer's own verdicts say."""
    if rng.random() < EASY_SHARE:
        return [_clause(rng, STATED, label, rng.randint(2, 3)) for _ in range(rng.randint(2, 3))]
    ((agreeing, opposing),) = rng.choices([votes for votes, _ in VOTES], [share for _, share in VOTES])
    if agreeing + opposing > 1:
        return [_stated(rng, label) for _ in range(agreeing)] + [_stated(rng, 1 - label) for _ in range(opposing)]
    (kind,) = rng.choices([kind for kind, _ in KINDS], [share for _, share in KINDS])
    return [kind(rng, label)]


def _neutral_sentence(rng: random.Random) -> str:
    """A sentence about the plot, the makers or the evening."""
    words = []
    for word in rng.choice(NEUTRAL).split():
        slot = word.strip(".,")
        if slot == "{name}":
            word = word.replace(slot, rng.choice(NAME_STARTS) + rng.choice(NAME_ENDS))
        elif slot.startswith("{"):
            word = word.replace(slot, rng.choice(SLOTS[slot[1:-1]]))
        words.append(word)
    return " ".join(words)


def _review(rng: random.Random, label: int) -> str:
    """One review of `MIN_WORDS` to `MAX_WORDS` words."""
    sentences = [clause + "." for clause in _verdicts(rng, label)]
    num_words = sum(len(sentence.split()) for sentence in sentences)
    wanted = rng.randint(MIN_WORDS, MAX_WORDS - 15)
    while num_words < wanted:
        sentence = _neutral_sentence(rng)
        length = len(sentence.split())
        if num_words + length <= MAX_WORDS:
            sentences.append(sentence)
            num_words += length
    rng.shuffle(sentences)
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def make_reviews(count: int, seed: int) -> tuple[list[str], list[int]]:
    """Generate `count` different reviews of 20 to 120 words and their labels.

    Labels come in shuffled pairs, so any even count holds as many positive (1) as negative (0) reviews. The same
    seed gives the same texts on every machine, and a larger count only appends to them.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}; generate at least 1 review.")
    rng = random.Random(seed)
    reviews: dict[str, int] = {}
    while len(reviews) < count:
        for label in rng.sample((0, 1), 2):
            text = _review(rng, label)
            while text in reviews:
                text = _review(rng, label)
            reviews[text] = label
    return list(reviews)[:count], list(reviews.values())[:count]


@dataclass(frozen=True, kw_only=True)
class DemoTask:
    """Where the embedded task lies on disk.

    Attributes:
        model: Folder with the untrained encoder and its tokenizer, as transformers saves them.
        dataset: Folder with `train.parquet` and `validation.parquet`, columns `text` and `label`.
    """

    model: Path
    dataset: Path


def build_demo(folder: Path, seed: int = 0) -> DemoTask:
    """Write the embedded task under `folder`, or reuse what an earlier call completed there.

    Each file is renamed into its place once it is whole. `demo.json`, which names the seed, comes last, so an
    interrupted call leaves nothing that a later one would mistake for complete.

    Args:
        folder: Receives `model/` and `dataset/`; made if missing.
        seed: Decides the texts and the weights. A folder made from another seed is written anew.
    Raises:
        OSError: The folder cannot be written.
    """
    task = DemoTask(model=folder / "model", dataset=folder / "dataset")
    marker = folder / "demo.json"
    recipe = json.dumps({"version": RECIPE_VERSION, "seed": seed})
    if _is_complete(task, marker, recipe):
        logger.info("Reusing the embedded task in %s.", folder)
        return task
    marker.unlink(missing_ok=True)
    task.model.mkdir(parents=True, exist_ok=True)
    task.dataset.mkdir(parents=True, exist_ok=True)
    texts, labels = make_reviews(TRAIN_REVIEWS + VALIDATION_REVIEWS, seed)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        made = Path(scratch)
        _save_reviews(texts[:TRAIN_REVIEWS], labels[:TRAIN_REVIEWS], made / "train.parquet")
        _save_reviews(texts[TRAIN_REVIEWS:], labels[TRAIN_REVIEWS:], made / "validation.parquet")
        for split in DATASET_FILES:
            (made / split).replace(task.dataset / split)
        tokenizer = _make_tokenizer(texts[:TRAIN_REVIEWS])
        tokenizer.save_pretrained(made / "model")
        _make_encoder(len(tokenizer), seed).save_pretrained(made / "model")
        as_the_umask_says(made)
        for file in sorted((made / "model").iterdir()):
            file.replace(task.model / file.name)
        (made / marker.name).write_text(recipe, encoding="utf-8")
        (made / marker.name).replace(marker)
    logger.info("Wrote the embedded task to %s.", folder)
    return task


def _is_complete(task: DemoTask, marker: Path, recipe: str) -> bool:
    """Whether an earlier call with the same recipe ended and all its files are still there."""
    files = [task.dataset / name for name in DATASET_FILES] + [task.model / name for name in MODEL_FILES]
    try:
        written = marker.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return written == recipe and all(file.is_file() for file in files)


def _save_reviews(texts: list[str], labels: list[int], path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    Dataset.from_dict({"text": texts, "label": labels}, features=features).to_parquet(path)


def _make_tokenizer(texts: Sequence[str]) -> BertTokenizer:
    """A lower-casing WordPiece tokenizer: common words whole, names in two pieces, anything else in letters.

    The vocabulary is listed rather than trained, so it is the same on every machine.
    """
    names = {start + end for start in NAME_STARTS for end in NAME_ENDS}
    words = {word.strip(".,") for text in texts for word in text.split()} - names
    symbols = string.ascii_lowercase + string.digits + string.punctuation
    pieces = (
        *SPECIAL_TOKENS,
        *symbols,
        *("##" + symbol for symbol in symbols),
        *(start.lower() for start in NAME_STARTS),
        *("##" + end for end in NAME_ENDS),
        *sorted(word.lower() for word in words),
    )
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=MAX_TOKENS)


def _make_encoder(vocabulary_size: int, seed: int) -> BertForSequenceClassification:
    """The tiny BERT with random weights; the caller's random state is left as it was.

    Its weights start wider than BERT's 0.02, which is meant for wider layers, and it trains without dropout: a few
    thousand reviews are read twice at most.
    """
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=SPECIAL_TOKENS.index("[PAD]"),
        id2label=dict(enumerate(LABELS)),
        label2id={name: label for label, name in enumerate(LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BertForSequenceClassification(config)
    positions = network.bert.embeddings.position_embeddings.weight
    positions.data.copy_(_sinusoids(*positions.shape) * config.initializer_range * 2)
    return network


def _sinusoids(count: int, width: int) -> Tensor:
    """Sines and cosines (count, width) of the position at geometric wavelengths; from them a neighbour is easily found.

    Source: Vaswani et al. 2017, "Positional Encoding".
    """
    angles = torch.arange(count)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
