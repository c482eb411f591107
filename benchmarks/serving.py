"""What an exported model saves in time where it is served, on this machine's processor.

Usage: python benchmarks/serving.py --encoder DIR --work DIR [--parts realised,sst2,imdb,bert]

Prints JSON lines. Within a part all that is compared takes turns, after untimed rounds, with a pause before each; times
are medians of `--repeats` rounds or more and cover the model alone, from token ids to logits, tokenising left out. Each
engine has a process of its own, as where it is served: in one process they slow each other down, the quickest most.

- `realised`: reviews cut at 128, 256 and 384 tokens, 1, 8 and 32 at a time, at a length config like those of a front
  against the same engine at full length: (full time / time) / (full MACs / MACs). MACs are those of `model.macs`; as
  every engine computes a classifier's last layer for [CLS] alone, at full length too, `realised_of_computed` counts
  those that are left of either.
- `sst2`: the same for sentences of SST-2's validation split (`--sst2`, a folder), 32 at a time as they come.
- `imdb`: an export that `hpo export` wrote (`--imdb-hf`, `--imdb-onnx`, `--imdb-int8`) over reviews (`--imdb`) cut at
  256 tokens, 8 at a time as they come, against plain transformers (SDPA, padded to the longest of each batch) and ONNX
  Runtime at full length, all threads together. Without an export it is the encoder at the config of `realised`, whose
  quality nobody knows.
- `bert`: BERT-base with random weights in plain transformers against MiniLM in int8 at the published lengths for SQuAD,
  32 sequences of 384 tokens.

Engines are "torch", what `LengthAdaptivePipeline` runs of a transformers folder; "onnx", a graph in one session of ONNX
Runtime whose threads compute each batch together; and "runner", the same graph as the pipeline and an export's
`runner.py` compute it, each thread a part of the batch.

Graphs are kept in `--work`; a first run with `--prepare` writes them and measures nothing. The encoder may be
untrained: time does not depend on what the weights are.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, BertConfig

from hpo.workload import library_versions
from model.apart import Engine, Maker, apart
from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.front_file import ServedFront
from model.hardware import computes_in_bf16, processor_name
from model.length_config import LengthConfig
from model.macs import layer_macs
from model.onnx_export import input_names, quantise, write_graph
from model.packed import PackedNetwork
from model.precision import Precision
from model.timing import Batches, Timing, dense, in_batches, of_export, of_graph, ours, race, run_dense
from model.tokenizer import load_tokenizer

LENGTHS, BATCHES = (128, 256, 384), (1, 8, 32)
FRONT_LIKE = LengthConfig.from_shares((0.85, 0.65, 0.5, 0.4, 0.3, 0.2))
SQUAD = LengthConfig.from_lengths((315, 251, 242, 159, 142, 33), max_length=384)
LONGEST, IMDB_CUT = 384, 256
PAD = 0
"""BERT's id of the padding token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="transformers folder of MiniLM-L6-H384")
    parser.add_argument("--work", type=Path, required=True, help="folder for graphs")
    parser.add_argument("--parts", default="realised,sst2,imdb,bert")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sst2", help="folder with SST-2's validation split")
    parser.add_argument("--sentences", type=int, default=320, help="of SST-2")
    parser.add_argument("--imdb", help="Parquet file of IMDb's test split")
    parser.add_argument("--reviews", type=int, default=96)
    parser.add_argument("--imdb-hf", type=Path)
    parser.add_argument("--imdb-onnx", type=Path)
    parser.add_argument("--imdb-int8", type=Path)
    parser.add_argument("--engines", default="torch fp32,torch bf16,onnx fp32,onnx int8,runner fp32,runner int8")
    parser.add_argument("--tasks", default="classification,question-answering", help="of `realised`")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="of `realised`")
    parser.add_argument("--prepare", action="store_true")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"part {unknown[0]!r} is none of {', '.join(PARTS)}")
    for part, texts in NEEDED_TEXTS.items():
        if part in parts and getattr(arguments, texts) is None:
            parser.error(f"part {part!r} needs --{texts}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    for part in parts:
        PARTS[part](arguments)


def realised(arguments: argparse.Namespace) -> None:
    for task in arguments.tasks.split(","):
        model = LengthAdaptiveModel.from_pretrained(arguments.encoder, task, num_labels=2).eval()
        realised_by(model, arguments)


def realised_by(model: LengthAdaptiveModel, arguments: argparse.Namespace) -> None:
    sizes = list(map(int, arguments.batches.split(",")))
    split = joined([long_reviews(arguments, max(sizes), length) for length in LENGTHS])
    names, engines = engines_at_both(model, split, arguments)
    if arguments.prepare:
        return
    with started(engines) as made:
        for (place, length), size in itertools.product(enumerate(LENGTHS), sizes):
            batches = [place * max(sizes) + np.arange(size)]
            timings = race_over(made, batches, arguments.repeats)
            fields = {"part": "realised", "task": model.task, "tokens": length, "batch": size}
            for name in names:
                report_share(model, name, timings, split, batches, **fields)


def sst2(arguments: argparse.Namespace) -> None:
    model = LengthAdaptiveModel.from_pretrained(arguments.encoder, "classification", num_labels=2).eval()
    file = str(Path(arguments.sst2) / "validation.parquet")
    texts = datasets.load_dataset("parquet", data_files=file, split="train")["sentence"][: arguments.sentences]
    split = tokenised(arguments.encoder, texts, LONGEST)
    names, engines = engines_at_both(model, split, arguments)
    if arguments.prepare:
        return
    batches = in_batches(len(split), 32)
    with started(engines) as made:
        timings = race_over(made, batches, arguments.repeats)
    mean = float(split.num_tokens.mean())
    for name in names:
        report_share(model, name, timings, split, batches, part="sst2", mean_tokens=round(mean, 1), batch=32)


def imdb(arguments: argparse.Namespace) -> None:
    folder = arguments.imdb_hf or arguments.encoder
    model = LengthAdaptiveModel.from_pretrained(folder, "classification", num_labels=2).eval()
    front = ServedFront.read(folder) if arguments.imdb_hf else None
    config, full = front.chosen.length_config if front else FRONT_LIKE, LengthConfig.full(model.num_layers)
    texts = datasets.load_dataset("parquet", data_files=arguments.imdb, split="train")["text"][: arguments.reviews]
    split = tokenised(folder, texts, IMDB_CUT)

    def engine(kind: str, length_config: LengthConfig) -> Engine:
        name = "imdb" if front else "random"
        return engine_of(model, length_config, kind, split, arguments.work, folder, name=name)

    def transformers(dtype: torch.dtype) -> Engine:
        return Engine(dense, ("sdpa", folder, type(model.network), input_names(model), split, PAD, dtype))

    engines = {
        "transformers sdpa fp32": transformers(torch.float32),
        "onnx fp32, full length": engine("onnx fp32", full),
        "onnx int8, full length": engine("onnx int8", full),
        "torch fp32": engine("torch fp32", config),
    }
    for precision, exported in (("fp32", arguments.imdb_onnx), ("int8", arguments.imdb_int8)):
        for kind in (f"onnx {precision}", f"runner {precision}"):
            engines[kind] = graph_engine(kind, model, exported / "model.onnx", split) if front else engine(kind, config)
    if computes_in_bf16():
        engines["transformers sdpa bf16"] = transformers(torch.bfloat16)
        engines["torch bf16, full length"] = engine("torch bf16", full)
        engines["torch bf16"] = engine("torch bf16", config)
    if arguments.prepare:
        return
    with started(engines) as made:
        timings = race_over(made, in_batches(len(split), 8), arguments.repeats)
    base = timings["transformers sdpa fp32"].median_s
    for name, timing in timings.items():
        line: dict[str, Any] = {"part": "imdb", "engine": name, "batch": 8, "reviews": len(texts), "cut_at": IMDB_CUT}
        line |= {"ms_per_review": round(1e3 * timing.median_s / len(texts), 3), "baseline": "transformers sdpa fp32"}
        line["speed_up"] = round(base / timing.median_s, 3)
        same = f"onnx {name.split()[1]}, full length"
        if name.split()[0] in ("torch", "onnx", "runner") and "full" not in name and same in timings:
            line["over_onnx_at_full_length"] = round(timings[same].median_s / timing.median_s, 3)
        if "full" not in name and "sdpa" not in name:
            counts = split.num_tokens.tolist()
            saved = sum(model.macs(tokens) for tokens in counts) / sum(model.macs(tokens, config) for tokens in counts)
            line |= {"config": str(config), "macs_saved": round(saved, 3)}
            if front:
                chosen = front.chosen
                line |= {"trial": chosen.trial, "full": front.full.metric, "chosen": chosen.metric}
                line |= {"full_on_report": front.full.report_metric, "chosen_on_report": chosen.report_metric}
        say(line, timing)


def bert(arguments: argparse.Namespace) -> None:
    model = LengthAdaptiveModel.from_pretrained(arguments.encoder, "question-answering").eval()
    names = ("onnx int8", "runner int8", "onnx fp32", *(["torch bf16"] if computes_in_bf16() else []))
    split = long_reviews(arguments, 32, LONGEST)
    engines = {
        name: engine_of(model, SQUAD, name, split, arguments.work, arguments.encoder, name="squad") for name in names
    }
    if arguments.prepare:
        return
    base = "BERT-base, transformers sdpa fp32"
    with started({base: Engine(bert_base, (input_names(model), split))} | engines) as made:
        timings = race_over(made, in_batches(len(split), 32), arguments.repeats)
    for name, timing in timings.items():
        line: dict[str, Any] = {"part": "bert", "engine": name, "batch": 32, "tokens": LONGEST}
        line["ms_per_sequence"] = round(1e3 * timing.median_s / 32, 2)
        line["speed_up"] = round(timings[base].median_s / timing.median_s, 3)
        say(line | ({"lengths": str(SQUAD)} if name in engines else {}), timing)


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "realised": realised,
    "sst2": sst2,
    "imdb": imdb,
    "bert": bert,
}
NEEDED_TEXTS = {"realised": "imdb", "sst2": "sst2", "imdb": "imdb", "bert": "imdb"}
"""The argument that says where each part's texts are."""


@contextmanager
def started(engines: Mapping[Any, Engine]) -> Iterator[dict[Any, Maker]]:
    """Each engine in its process, until the block ends."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(apart(engine, str(name))) for name, engine in engines.items()}


def race_over(made: Mapping[Any, Maker], batches: Batches, repeats: int) -> dict[Any, Timing]:
    return race({name: make(batches) for name, make in made.items()}, repeats)


def engines_at_both(
    model: LengthAdaptiveModel, split: EncodedSplit, arguments: argparse.Namespace
) -> tuple[list[str], dict[tuple[str, LengthConfig], Engine]]:
    """The engines asked for that this machine has, shortened and at full length."""
    names = [name for name in arguments.engines.split(",") if name != "torch bf16" or computes_in_bf16()]
    engines = {
        (name, config): engine_of(model, config, name, split, arguments.work, arguments.encoder)
        for name, config in itertools.product(names, (FRONT_LIKE, LengthConfig.full(model.num_layers)))
    }
    return names, engines


def engine_of(
    model: LengthAdaptiveModel,
    config: LengthConfig,
    engine: str,
    split: EncodedSplit,
    work: Path,
    encoder: Path,
    *,
    name: str = "random",
) -> Engine:
    """Of "torch", "onnx" or "runner", and fp32, bf16 (torch) or int8; graphs are written where they are missing."""
    if engine.startswith("torch"):
        return Engine(packed, (encoder, model.task, config, "bf16" if engine.endswith("bf16") else "fp32", split))
    path = work / f"{name}-{model.task}-{config}-fp32.onnx"
    if not path.is_file():
        write_graph(model, config, path, longest=LONGEST)
    if engine.endswith("int8"):
        exact, path = path, path.with_name(path.name.replace("fp32", "int8"))
        if not path.is_file():
            quantise(exact, path)
    return graph_engine(engine, model, path, split)


def graph_engine(engine: str, model: LengthAdaptiveModel, path: Path, split: EncodedSplit) -> Engine:
    make = of_export if engine.startswith("runner") else of_graph
    return Engine(make, (path, input_names(model), split, PAD))


def packed(encoder: Path, task: str, config: LengthConfig, precision: Precision, split: EncodedSplit) -> Maker:
    network = PackedNetwork(LengthAdaptiveModel.from_pretrained(encoder, task, num_labels=2).eval(), precision)
    return lambda batches: ours(network, split, batches, config)


def bert_base(names: Sequence[str], split: EncodedSplit) -> Maker:
    network = AutoModelForQuestionAnswering.from_config(BertConfig(), dtype=torch.float32).eval()
    return run_dense(network, names, split, PAD)


def report_share(
    model: LengthAdaptiveModel,
    engine: str,
    timings: Mapping[Any, Timing],
    split: EncodedSplit,
    batches: Batches,
    **fields: Any,
) -> None:
    full = LengthConfig.full(model.num_layers)
    counts = split.num_tokens[np.concatenate(batches)].tolist()
    macs, computed = (
        [sum(count(model, tokens, config) for tokens in counts) for config in (full, FRONT_LIKE)]
        for count in (LengthAdaptiveModel.macs, macs_for_first)
    )
    speed_up = timings[engine, full].median_s / timings[engine, FRONT_LIKE].median_s
    line = {**fields, "engine": engine, "full_length_ms": round(1e3 * timings[engine, full].median_s, 3)}
    line |= {"speed_up": round(speed_up, 3), "macs_saved": round(macs[0] / macs[1], 3)}
    line |= {"realised": round(speed_up * macs[1] / macs[0], 3)}
    if model.reads_first:
        line["realised_of_computed"] = round(speed_up * computed[1] / computed[0], 3)
    say(line | {"config": str(FRONT_LIKE)}, timings[engine, FRONT_LIKE])


def macs_for_first(model: LengthAdaptiveModel, tokens: int, config: LengthConfig) -> int:
    """MACs where the last layer is computed for the first token alone, keys and values for all that arrive."""
    shape, counts = model.shape, np.array([tokens, *config.lengths(tokens)])
    whole = int(layer_macs(shape, counts[-2:-1], counts[-1:])[0])
    n, d = int(counts[-2]), shape.hidden_size
    ours = 2 * (n + 1) * d * d + 2 * n * d + shape.feed_forward_products * d * shape.feed_forward_size + 2 * d
    return model.macs(tokens, config) - whole + ours


def long_reviews(arguments: argparse.Namespace, size: int, length: int) -> EncodedSplit:
    """Reviews that are cut to one length."""
    texts = datasets.load_dataset("parquet", data_files=arguments.imdb, split="train")["text"][: 8 * LONGEST]
    split = tokenised(arguments.encoder, [text for text in texts if len(text) > 6 * length][: 2 * size], length)
    return split.take(np.flatnonzero(split.num_tokens == length)[:size])


def tokenised(folder: Path, texts: Sequence[str], longest: int) -> EncodedSplit:
    return as_split(load_tokenizer(folder)(list(texts), truncation=True, max_length=longest)["input_ids"])


def joined(splits: Sequence[EncodedSplit]) -> EncodedSplit:
    return as_split([ids for split in splits for ids in split.input_ids])


def as_split(input_ids: list[list[int]]) -> EncodedSplit:
    types = [[0] * len(ids) for ids in input_ids]
    return EncodedSplit(
        input_ids=input_ids, token_type_ids=types, labels=np.zeros(len(input_ids), dtype=np.int64), num_truncated=0
    )


def say(line: Mapping[str, Any], timing: Timing) -> None:
    spread = {"ms": timing.median_s, "least_ms": timing.least_s, "most_ms": timing.most_s}
    versions = library_versions() | {"onnxruntime": version("onnxruntime")}
    about = {"rounds": timing.rounds, "hardware": hardware(), "versions": versions}
    milliseconds = {name: round(1e3 * seconds, 3) for name, seconds in spread.items()}
    print(json.dumps({"benchmark": "serving", **line, **milliseconds, **about}), flush=True)


def hardware() -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "bf16_products": computes_in_bf16(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }


if __name__ == "__main__":
    main()
