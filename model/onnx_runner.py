"""Run an exported ONNX graph with onnxruntime, tokenizers and numpy alone.

`hpo export --format onnx` puts this file beside the graph. From Python:

    from runner import Runner
    Runner("FOLDER")(["a fine film", "a poor one"])

or from a shell, one JSON value in and one out per line: `echo '"a fine film"' | python FOLDER/runner.py`. An input is a
text; a list of two texts, or of a question and its context; of token classification a list of words.
"""

import json
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime
    import tokenizers
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"runner.py: {error}; install what it needs by `pip install onnxruntime tokenizers numpy`.")

BATCH = 32
ON_PROCESSOR = "CPUExecutionProvider"
MAX_ANSWER_TOKENS = 30
ANSWERS = 20
"""Likeliest answers to a question that its answer's probability is among."""


class SplitSession:
    """A graph of whose batches each processor core computes a part by itself; threads may share it.

    Threads that compute a batch together wait for each other after every operator, and fetch what the other wrote: on
    two cores that takes up to 1.2 times as long. A batch of fewer sequences than threads they do compute together.

    Attributes:
        names: Of the graph's inputs.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fixed_length: int | None = None,
        threads: int | None = None,
        providers: Sequence[str] = (ON_PROCESSOR,),
    ) -> None:
        """Load the graph.

        Args:
            path: Of its file.
            fixed_length: Tokens of every sequence, padding included, where the graph takes no others.
            threads: That compute; None takes one for each core that this process may use.
            providers: ONNX Runtime's execution providers; batches are cut for the processor alone.
        Raises:
            ValueError: Fewer than one thread.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}; choose 1 or more.")
        self.threads = threads or usable_cores()
        self._path, self._fixed_length = path, fixed_length
        splits = list(providers) == [ON_PROCESSOR] and self.threads > 1
        self._workers = ThreadPoolExecutor(self.threads) if splits else None
        self._together = load(path, self.threads, providers)
        self._alone: Any = None
        self._lock = threading.Lock()
        self.names = [given.name for given in self._together.get_inputs()]

    def run(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The output of each sequence; of a head that reads every token, of no fewer tokens than the sequence has.

        Args:
            arrays: By the inputs' names, (B, L) each, padding on the right.
        """
        count_B = arrays["attention_mask"].sum(axis=1)
        if self._workers is None or len(count_B) < self.threads:
            return list(self._together.run(None, dict(arrays))[0])
        with self._lock:
            if self._alone is None:
                self._alone = load(self._path, 1)
        parts = cut(count_B, self.threads)

        def compute(part: np.ndarray[Any, Any]) -> Any:
            longest = self._fixed_length or max(2, int(count_B[part].max()))
            return self._alone.run(None, {name: array[part, :longest] for name, array in arrays.items()})[0]

        outputs: list[Any] = [None] * len(count_B)
        for part, rows in zip(parts, self._workers.map(compute, parts), strict=True):
            for number, row in zip(part, rows, strict=True):
                outputs[number] = row
        return outputs


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(path: str | Path, threads: int, providers: Sequence[str] = (ON_PROCESSOR,)) -> Any:
    """A session of ONNX Runtime that computes with so many threads and says no more than errors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=list(providers))


def cut(count_B: np.ndarray[Any, Any], most: int) -> list[np.ndarray[Any, Any]]:
    """Sequences by their numbers, those of like length together, in at most so many parts whose largest is smallest.

    A part is as large as its tokens are many once it is padded to its longest sequence.
    """
    order_B = np.argsort(count_B, kind="stable")
    sorted_B = np.maximum(count_B[order_B], 1).tolist()

    def ends(limit: int) -> list[int]:
        """Where parts of at most so many tokens end, the longest sequences' first."""
        found: list[int] = []
        end = len(sorted_B)
        while end > 0 and len(found) <= most:
            found.append(end)
            end -= limit // sorted_B[end - 1]
        return found

    too_few, enough = sorted_B[-1] - 1, sorted_B[-1] * len(sorted_B)
    while enough - too_few > 1:
        limit = (too_few + enough) // 2
        too_few, enough = (too_few, limit) if len(ends(limit)) <= most else (limit, enough)
    return np.split(order_B, ends(enough)[:0:-1])


class Runner:
    """Texts in, predictions out, under the one length config that the graph was made for; threads may share it."""

    def __init__(
        self, folder: str | Path, providers: Sequence[str] = (ON_PROCESSOR,), *, threads: int | None = None
    ) -> None:
        """Load graph and tokenizer.

        Args:
            folder: What was exported.
            providers: ONNX Runtime's execution providers.
            threads: That compute; None takes one for each core that this process may use.
        """
        self.front = json.loads((Path(folder) / "length_front.json").read_text(encoding="utf-8"))
        self.graph = self.front["graph"]
        self.session = SplitSession(
            Path(folder) / self.graph["file"],
            fixed_length=self.graph["fixed_length"],
            threads=threads,
            providers=providers,
        )
        self.is_question = self.front["kind"] == "question-answering"
        self.is_words = self.front["kind"] == "token-classification"
        self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.whole = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        settings = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
        pad = settings.get("pad_token") or "[PAD]"
        pad = pad["content"] if isinstance(pad, dict) else pad
        self.pad = self.tokenizer.token_to_id(pad) or 0
        self.longest, self.stride = self.front["max_length"], self.front["stride"]
        side = settings.get("truncation_side") or "right"
        if not self.is_question:
            self.tokenizer.enable_truncation(self.longest, strategy="longest_first", direction=side)
        elif self.stride is not None:
            self.tokenizer.enable_truncation(self.longest, stride=self.stride, strategy="only_second", direction=side)
        self.hears_spaces = self._tokens("a") != self._tokens(" a")

    def __call__(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Predict, in the order of the inputs.

        Raises:
            ValueError: An input is something else, blank, without tokens, or longer than a model that knows no windows
                can read.
        """
        if isinstance(inputs, str | Mapping) or not isinstance(inputs, Iterable):
            raise ValueError("Predictions are asked for as a list; put the one input into a list.")
        if getattr(inputs, "ndim", 1) != 1:  # a table of pandas gives the names of its columns
            raise ValueError("Predictions are asked for as a list; make one of the table's rows.")
        inputs = [self._read(given) for given in inputs]
        encodings, owners = [], []
        for number, given in enumerate(inputs):
            for encoding in self._windows(given):
                if not encoding.ids:
                    raise ValueError("An input has no tokens: the tokenizer drops all of its text and adds none.")
                encodings.append(encoding)
                owners.append(number)
        logits: list[Any] = [None] * len(encodings)
        order = sorted(range(len(encodings)), key=lambda number: len(encodings[number].ids))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            for number, row in zip(part, self._logits([encodings[number] for number in part]), strict=True):
                logits[number] = row
        of_each: list[list[Any]] = [[] for _ in inputs]
        for number, *window in zip(owners, encodings, logits, strict=True):
            of_each[number].append(window)
        return [self._said(given, windows) for given, windows in zip(inputs, of_each, strict=True)]

    def _read(self, given: Any) -> Any:
        """A text, as many as the model was trained on, or words; of an object its columns."""
        columns = self.front["text_columns"]
        if isinstance(given, Mapping):
            if not given:
                raise ValueError("An input is an empty object.")
            if missing := [name for name in columns if name not in given]:
                raise ValueError(f"An input has no {missing[0]!r}, only {', '.join(map(repr, given))}.")
            values = [given[name] for name in columns]
            given = values if len(columns) > 1 else values[0]
        texts = [given] if isinstance(given, str) else given
        is_right = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
        if self.is_words and not (is_right and texts and not isinstance(given, str)):
            raise ValueError("An input is no list of words.")
        if not self.is_words and not (is_right and len(texts) == len(columns)):
            raise ValueError(f"An input is not what the model reads: {' and '.join(columns)}.")
        if not all(text.strip() for text in texts):
            raise ValueError(f"An input has a {'word' if self.is_words else 'text'} that is blank.")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise ValueError("An input has half a character, a lone surrogate as of an emoji that was cut.") from None
        return given

    def _windows(self, given: Any) -> list[Any]:
        """The sequences that an input becomes: one, or the windows of a context."""
        if self.is_words:
            words = [word if word.startswith(" ") or not self.hears_spaces else f" {word}" for word in given]
            return [self.tokenizer.encode(words, is_pretokenized=True)]
        text, *pair = [given] if isinstance(given, str) else given
        if not self.is_question:
            return [self.tokenizer.encode(text, *pair)]
        first = self.tokenizer.encode(self._cut(text.strip()), *pair)
        if len(first.ids) > self.longest:
            raise ValueError(f"A question and its context have {len(first.ids)} tokens; the most are {self.longest}.")
        return [first, *first.overflowing]

    def _cut(self, question: str) -> str:
        """The question, or as much of it as leaves room for new context in every window."""
        if self.stride is None:
            return question
        limit = (self.longest - self.tokenizer.num_special_tokens_to_add(is_pair=True) - self.stride) // 2
        whole = self.whole.encode(question, add_special_tokens=False)
        if len(whole.ids) <= limit:
            return question
        for keep in range(limit, 0, -1):  # a word that is cut may become more tokens than it had
            shorter = question[: whole.offsets[keep - 1][1]]
            if len(self.whole.encode(shorter, add_special_tokens=False).ids) <= limit:
                return shorter
        return ""

    def _logits(self, encodings: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
        length = self.graph["fixed_length"] or max(2, *(len(encoding.ids) for encoding in encodings))
        arrays = {name: np.zeros((len(encodings), length), dtype=np.int64) for name in self.session.names}
        arrays["input_ids"][:] = self.pad
        fields = {"input_ids": "ids", "attention_mask": "attention_mask"}
        if self.graph["token_types"]:
            fields["token_type_ids"] = "type_ids"
        for row, encoding in enumerate(encodings):
            for name in fields.keys() & arrays.keys():
                arrays[name][row, : len(encoding.ids)] = getattr(encoding, fields[name])
        return self.session.run(arrays)

    def _said(self, given: Any, windows: Sequence[Any]) -> dict[str, Any]:
        """What the logits of an input's windows mean, or of its one sequence; each comes with its encoding."""
        names, kind = self.front["label_names"], self.front["kind"]
        if self.is_question:
            return answer_of(given[1], np.concatenate([spans_of(*window) for window in windows]))
        ((encoding, logits),) = windows
        if self.is_words:
            tags = logits.argmax(axis=-1)
            first: dict[int, int] = {}
            for token, word in enumerate(encoding.word_ids):
                if word is not None:
                    first.setdefault(word, token)
            return {"tags": [names[tags[first[word]]] if word in first else "O" for word in range(len(given))]}
        if kind == "regression":
            return {"value": float(logits[0])}
        if kind == "multi-label":
            scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
            labels = [name for name, logit in zip(names, logits, strict=True) if logit > 0]
            return {"labels": labels, "scores": dict(zip(names, scores.tolist(), strict=True))}
        weights = np.exp(logits.astype(np.float64) - logits.max())
        return {"label": names[int(logits.argmax())], "score": float(weights.max() / weights.sum())}

    def _tokens(self, text: str) -> list[str]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).tokens)


def spans_of(encoding: Any, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The spans of a window's context, (S, 3): score, first character and the one after the last.

    The score is the start's logit and the end's, added.
    """
    inside_L = np.array([sequence == 1 for sequence in encoding.sequence_ids])
    place_L = np.arange(len(inside_L))
    start_L, end_L = np.where(inside_L[:, None], logits[: len(inside_L)], -np.inf).T
    follows_LL = place_L[None, :] - place_L[:, None]
    score_LL = np.where((follows_LL >= 0) & (follows_LL < MAX_ANSWER_TOKENS), start_L[:, None] + end_L, -np.inf)
    first_S, last_S = np.nonzero(np.isfinite(score_LL))
    offsets_L2 = np.array(encoding.offsets)
    return np.column_stack([score_LL[first_S, last_S], offsets_L2[first_S, 0], offsets_L2[last_S, 1]])


def answer_of(context: str, spans_S3: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The likeliest of all windows' spans that is not blank, and its probability among the likeliest `ANSWERS`."""
    found: dict[str, tuple[int, float]] = {}
    for score, begin, end in spans_S3[np.argsort(-spans_S3[:, 0], kind="stable")]:
        text = context[int(begin) : int(end)]
        if answer := text.strip():
            found.setdefault(answer, (int(begin) + len(text) - len(text.lstrip()), score))
        if len(found) == ANSWERS:
            break
    if not found:
        return {"answer": "", "start": 0, "end": 0, "score": 0.0}
    answer, (start, best) = next(iter(found.items()))
    weights = np.exp([score - best for _, score in found.values()])
    return {"answer": answer, "start": start, "end": start + len(answer), "score": float(1 / weights.sum())}


def value_of(line: bytes) -> Any:
    """The JSON value of a line in UTF-8, which some programs begin with a byte order mark.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("The line is nested too deeply.") from None


def main() -> None:
    """Answer standard input line by line; lines that cannot be read are answered with what is wrong with them."""
    for name, stream in (("input", sys.stdin), ("output", sys.stdout)):
        if stream is None:
            sys.exit(f"runner.py: Standard {name} is closed; run `python runner.py < in.jsonl > out.jsonl`.")
    unread = 0
    try:
        runner = _beside(Path(__file__))
        for line in sys.stdin.buffer:
            try:
                (said,) = runner([value_of(line)])
            except ValueError as error:
                said, unread = {"error": str(error)}, unread + 1
            sys.stdout.buffer.write(f"{json.dumps(said, ensure_ascii=False)}\n".encode())
            sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what could not be written
        has_enough = isinstance(error, BrokenPipeError)  # whoever read the answers
        sys.exit(1 if has_enough else f"runner.py: Cannot read or write: {error.strerror}.")
    except KeyboardInterrupt:
        sys.exit(130)
    if unread:
        sys.exit(1)


def _beside(file: Path) -> Runner:
    try:
        return Runner(file.parent)
    except Exception as error:  # each library has classes of its own
        sys.exit(
            f"runner.py: {file.parent} cannot be served by onnxruntime {onnxruntime.__version__} "
            f"({[*str(error).splitlines(), type(error).__name__][0]}); copy the whole folder again, or install a newer "
            "onnxruntime."
        )


if __name__ == "__main__":
    main()
