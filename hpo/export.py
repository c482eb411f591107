"""`hpo export`: a point of a study's front as a folder that serves it."""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import optuna

from hpo.errors import HpoError
from hpo.front import BASELINE, Front, FrontPoint, choose, compute_front, flops_text, percents, quality_text
from hpo.runs import write_folder
from hpo.storage import IDENTITY
from hpo.workload import LoadedWorkload, Workload, lengths_of, library_versions, load_workload, with_paths
from model.data import encode, load_corpus
from model.encoded import EncodedSplit
from model.encoder import CheckpointError, LengthAdaptiveModel, given_labels, read_config
from model.evaluate import Evaluator
from model.export import (
    LEAST_LENGTH,
    RUNNER_FILE,
    quantise_folder,
    write_onnx_folder,
    write_transformers_folder,
)
from model.front_file import FRONT_FILE, ExportError, ServedFront, ServedPoint
from model.length_config import LengthConfig
from model.onnx_export import OPSET, require_onnx
from model.pipeline import LengthAdaptivePipeline
from model.tasks import Metric
from model.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

Format = Literal["hf", "onnx"]
FORMATS: tuple[Format, ...] = ("hf", "onnx")
Int8 = Literal["dynamic", "static"]
INT8: tuple[Int8, ...] = ("dynamic", "static")
CALIBRATION = 128
"""Sequences of the search split that fix the ranges of a static quantisation."""
NOTABLE = 0.01
"""A loss to int8 or to a fixed length that a user is warned of: one point."""
PIPELINE_TAGS = {
    "classification": "text-classification",
    "regression": "text-classification",
    "question-answering": "question-answering",
    "token-classification": "token-classification",
}
"""What the hub calls the tasks."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder that was written.

    Attributes:
        folder: Where it is.
        front: What it serves.
        difference: The largest difference between logits of the folder, in float32, and of the encoder.
        uncut: The metric of the point on the report split, where a fixed length cuts sequences that the study had not
            cut; else None.
        float32: The metric of the float32 graph there; None where nothing is cut or quantised.
        int8: That of the quantised one; None where nothing was quantised.
    """

    folder: Path
    front: ServedFront
    difference: float
    uncut: float | None = None
    float32: float | None = None
    int8: float | None = None


def export(
    study: optuna.Study,
    storage: str,
    runs: Path,
    out: Path,
    *,
    format: Format = "hf",
    max_drop: float | None = None,
    budget: float | None = None,
    max_latency_ms: float | None = None,
    trial: int | None = None,
    fixed_length: int | None = None,
    opset: int = OPSET,
    int8: Int8 | None = None,
) -> Exported:
    """Write a point of a lengths study's front as a folder, checked against the encoder.

    Args:
        study: What `hpo search-lengths` made.
        storage: URL of its database.
        runs: Folder of the checkpoints.
        out: Where to write; an earlier export there is replaced.
        format: "hf" for transformers, with the whole front; "onnx" for a graph of the chosen point.
        max_drop: Choose the cheapest point that loses at most this much on the search split.
        budget: Choose the best point of at most this share of full length.
        max_latency_ms: Choose the best point that `hpo bench` saw take at most this long.
        trial: Choose this completed trial, on the front or not.
        fixed_length: Tokens that a graph's sequences are padded to; None leaves their length free.
        opset: Of ONNX.
        int8: Quantise the graph; "static" with ranges from the search split.
    Raises:
        HpoError: The study has no front or no such point, its checkpoint is gone or another one, or `out` is in use.
        ExportError: The graph cannot be written as asked, or does not compute what the encoder does.
    """
    if format == "onnx":
        require_onnx()
    _check_place(out)
    front = compute_front(study, storage)
    chosen = _chosen(front, max_drop=max_drop, budget=budget, max_latency_ms=max_latency_ms, trial=trial)
    checkpoint = checkpoint_of(study, runs)
    workload = Workload.from_attribute(front.workload)
    tokenizer = load_tokenizer(checkpoint)
    scored_length, scored_stride = lengths_of(workload, tokenizer, checkpoint)
    if fixed_length is not None and LEAST_LENGTH <= fixed_length <= scored_length:
        workload = dataclasses.replace(workload, max_length=fixed_length)
    names = _names_of_unnamed(study, checkpoint)
    model = LengthAdaptiveModel.from_pretrained(checkpoint, workload.task, label_names=names).eval()
    if model.fingerprint() != study.user_attrs.get(IDENTITY, {}).get("model"):
        raise HpoError(f"The model in {checkpoint} is not the one that study {front.study!r} searched; restore it.")
    max_length, stride = lengths_of(workload, tokenizer, checkpoint)
    is_text = model.task in ("regression", "question-answering")
    served = ServedFront(
        task=model.task,
        kind="multi-label" if model.is_multi_label else model.task,
        label_names=() if is_text else model.label_names,
        text_columns=_text_columns(study, workload),
        max_length=max_length,
        stride=stride if model.task == "question-answering" else None,
        metric=front.metric,
        full=served_point(front.full),
        points=tuple(map(served_point, front.points)),
        chosen=served_point(chosen),
        versions=library_versions(),
        scored_length=scored_length,
    )
    measured: dict[str, float] = {}
    results: list[Exported] = []

    def write(folder: Path) -> None:
        if format == "hf":
            difference = write_transformers_folder(folder, model, tokenizer, served)
        else:
            difference = write_onnx_folder(folder, model, tokenizer, served, fixed_length=fixed_length, opset=opset)
        cuts = max_length < scored_length and not _refuses_longer(served)
        if int8 or cuts:
            loaded = load_workload(workload, checkpoint)
            if cuts:
                whole = encode(loaded.corpus.report, tokenizer, scored_length, loaded.corpus.kind, scored_stride)
                if whole.num_tokens.max() > max_length:
                    measured["uncut"] = _uncut_quality(model, chosen, whole, loaded.metric)
            if int8 or measured:
                measured["float32"] = _report_quality(folder, loaded)
            if int8:
                few = loaded.search.take(np.arange(min(CALIBRATION, len(loaded.search))))
                quantise_folder(folder, tokenizer.pad_token_id or 0, few if int8 == "static" else None)
                measured["int8"] = _report_quality(folder, loaded)
        written = ServedFront.read(folder)
        if written.graph:
            graph = dataclasses.replace(written.graph, report_metric=measured.get("int8", measured.get("float32")))
            written = dataclasses.replace(written, graph=graph)
        (folder / "README.md").write_text(model_card(front, chosen, written, measured), encoding="utf-8")
        written = dataclasses.replace(written, files=tuple(sorted(entry.name for entry in folder.iterdir())))
        written.write(folder)
        results.append(Exported(folder=out, front=written, difference=difference, **measured))

    try:
        write_folder(out.resolve(), write)  # a link stays, and leads to the new folder
    except HpoError as error:
        raise HpoError(f"Cannot write {out} ({error}); make room or choose another --out.") from error
    return results[0]


def model_card(front: Front, chosen: FrontPoint, served: ServedFront, measured: Mapping[str, float]) -> str:
    """The folder's README.md.

    Args:
        front: The study's.
        chosen: The exported point.
        served: What the folder holds.
        measured: The metric on the report split, as `Exported` has it: "uncut", "float32" and "int8".
    """
    recorded = str(front.workload["data"]["dataset"])
    dataset = with_paths(recorded, lambda path: Path(path).name if Path(path).is_absolute() else path)
    graph = served.graph
    lines = [
        "---",
        f"library_name: {'onnx' if graph else 'transformers'}",
        f"pipeline_tag: {PIPELINE_TAGS[served.task]}",
        "tags: [length-adaptive, hpo]",
        "---",
        "",
        f"# {served.kind.replace('-', ' ').capitalize()} with fewer tokens from layer to layer",
        "",
        "Trained once with LengthDrop; a study searched how many tokens each layer keeps. Every row below is the same",
        f"weights under another length config. The dataset is {dataset}, from the columns "
        f"{', '.join(served.text_columns)}; texts are cut after {served.max_length} tokens.",
        "",
        f"| trial | share of FLOPs | {front.metric}, search split | {front.metric}, report split | tokens left, % |",
        "| --- | --- | --- | --- | --- |",
        *(_card_row(point, chosen) for point in front.points),
        *([_card_row(chosen, chosen)] if chosen.trial not in {point.trial for point in front.points} else []),
        f"| full length | 100 % | {front.full.metric:.4f} | {quality_text(front.full.report_metric)} | 100 |",
        "",
        f"The bold row is what this folder was exported for. Shares are of {BASELINE}, {flops_text(front.full.macs)}",
        "per sequence of the search split, and count multiply-accumulates: they promise work saved, not time, which",
        "depends on the machine. Points were chosen on the search split; the report split was looked at once for each.",
        "",
        *_usage(served),
        *_measurements(served, measured),
    ]
    made = ", ".join(f"{name} {version}" for name, version in served.versions.items())
    return "\n".join([*lines, f"Made with {made}.", ""])


def _measurements(served: ServedFront, measured: Mapping[str, float]) -> list[str]:
    """What the graph was seen to lose, for the folder's card."""
    lines = []
    if served.scored_length != served.max_length:
        table = f"The table's figures are of texts cut after {served.scored_length} tokens"
        longer = "refuses longer texts" if _refuses_longer(served) else "no text of the report split is longer"
        lines += [
            f"{table}. Cut after {served.max_length}, as this graph takes them, {served.metric} on the report split is "
            f"{measured['float32']:.4f} instead of {measured['uncut']:.4f}."
            if "uncut" in measured
            else f"{table}; this graph takes {served.max_length}, and {longer}.",
            "",
        ]
    if served.graph and "int8" in measured:
        alike = ", of texts cut alike," * ("uncut" in measured)
        lines += [
            f"The graph is quantised to {served.graph.precision}: {served.metric} on the report split is "
            f"{measured['int8']:.4f}, in float32{alike} it was {measured['float32']:.4f}.",
            "",
        ]
    return lines


def _refuses_longer(served: ServedFront) -> bool:
    """Whether texts that are too long are refused, not cut."""
    return served.task == "question-answering" and served.stride is None


def _usage(served: ServedFront) -> list[str]:
    """How to run the folder, for its card."""
    if served.graph is None:
        names = {"question-answering": "QuestionAnswering", "token-classification": "TokenClassification"}
        auto = f"AutoModelFor{names.get(served.task, 'SequenceClassification')}"
        return [
            "```python",
            "from model import LengthAdaptivePipeline  # of hpo",
            "",
            'LengthAdaptivePipeline("FOLDER")(inputs, budget=0.5)  # or max_drop=0.01; neither runs the bold row',
            "",
            f"from transformers import {auto}",
            "",
            f'{auto}.from_pretrained("FOLDER")  # full length, transformers alone',
            f'{auto}.from_pretrained("FOLDER", trust_remote_code=True)  # the bold row, by length_adaptive.py',
            "```",
            "",
        ]
    shape = "any batch and length" if served.graph.fixed_length is None else f"{served.graph.fixed_length} tokens"
    return [
        f"`{served.graph.file}` (opset {served.graph.opset}, {served.graph.precision}) takes {shape}, padded on the",
        f"right; `{RUNNER_FILE}` needs onnxruntime, tokenizers and numpy:",
        "",
        "```python",
        "from runner import Runner",
        "",
        'Runner("FOLDER")(inputs)',
        "```",
        "",
    ]


def _card_row(point: FrontPoint, chosen: FrontPoint) -> str:
    kept = " ".join(percents(point.shares, point.skipped).split())
    cells = [
        str(point.trial),
        f"{point.relative_macs:.1%}",
        f"{point.metric:.4f}",
        quality_text(point.report_metric),
        kept,
    ]
    if point.trial == chosen.trial:
        cells = [f"**{cell}**" for cell in cells]
    return f"| {' | '.join(cells)} |"


def _check_place(out: Path) -> None:
    """Refuse a place that something else is in."""
    if out.resolve() == Path.cwd():
        raise HpoError("The export would take the place of the current folder; choose a new one in it as --out.")
    if out.exists() and not out.is_dir():
        raise HpoError(f"{out} is a file; choose another --out.")
    entries = sorted(out.iterdir()) if out.is_dir() else []
    known = _files_of(out)
    if foreign := [entry.name for entry in entries if _is_foreign(entry, known)]:
        raise HpoError(f"{out} holds {foreign[0]}, which no export wrote; choose another --out, or move it away.")


def _files_of(out: Path) -> tuple[str, ...] | None:
    """The names of what an export put into a folder; empty where it is none, None where that does not tell."""
    if not (out / FRONT_FILE).is_file():
        return ()
    with suppress(ExportError):  # of another version, or damaged
        return ServedFront.read(out).files or None
    return None


def _is_foreign(entry: Path, known: tuple[str, ...] | None) -> bool:
    """Whether it is neither an export's nor bytecode, which Python puts there as it runs an export's files."""
    is_bytecode = entry.name == "__pycache__" and all(file.suffix == ".pyc" for file in entry.glob("*"))
    return not is_bytecode and (entry.is_dir() if known is None else entry.name not in known)


def _chosen(front: Front, *, trial: int | None, **wish: float | None) -> FrontPoint:
    if trial is None:
        return choose(front, **wish)
    completed = {point.trial: point for point in (*front.dominated, *front.points, front.full)}
    if trial not in completed:
        on_front = ", ".join(str(point.trial) for point in front.points)
        raise HpoError(
            f"Study {front.study!r} has no completed trial {trial} to export; choose one of its front: {on_front}."
        )
    return completed[trial]


def checkpoint_of(study: optuna.Study, runs: Path) -> Path:
    """The folder of the encoder that was searched: where it was, or in a runs folder that has moved.

    Raises:
        CheckpointError: It is at neither place.
    """
    recorded = Path(str(study.user_attrs.get("checkpoint", "")))
    moved = runs / Path(*recorded.parts[-2:])
    for folder in (recorded, moved):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"The model of study {study.study_name!r} is neither at {recorded.absolute()} nor at {moved.absolute()}; pass "
        "its runs folder as --runs."
    )


def _text_columns(study: optuna.Study, workload: Workload) -> tuple[str, ...]:
    """The dataset's names of what a prediction starts from; studies of earlier versions do not record them."""
    if "text_columns" in study.user_attrs:
        return tuple(study.user_attrs["text_columns"])
    return workload.data.text_columns or load_corpus(workload.data, workload.task).columns.texts


def _names_of_unnamed(study: optuna.Study, checkpoint: Path) -> tuple[str, ...] | None:
    """The dataset's names of classes that nobody named in the checkpoint; studies of earlier versions record none."""
    if given_labels(read_config(checkpoint)):
        return None
    return tuple(study.user_attrs.get("label_names", ())) or None


def served_point(point: FrontPoint) -> ServedPoint:
    """A point of a front as an export keeps it."""
    return ServedPoint(
        trial=point.trial,
        length_config=LengthConfig.from_shares(point.shares, point.skipped or ()),
        metric=point.metric,
        report_metric=point.report_metric,
        macs=point.macs,
        relative_macs=point.relative_macs,
        latency_ms=point.latency_ms,
    )


def _uncut_quality(model: LengthAdaptiveModel, point: FrontPoint, report: EncodedSplit, metric: Metric) -> float:
    """The metric of a point on the report split at the study's length, which knows it of the points of its front."""
    if point.report_metric is not None:
        return point.report_metric
    config = served_point(point).length_config
    return report.quality(metric, Evaluator(model, report, cache_bytes=0).predict([config])[0])


def _report_quality(folder: Path, loaded: LoadedWorkload) -> float:
    return LengthAdaptivePipeline(folder).quality(loaded.report, loaded.metric)
