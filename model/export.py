"""Folders that serve a trained encoder: for transformers with the whole front, or as an ONNX graph of one config.

Each is checked against the encoder before anybody hears of it.
"""

import copy
import dataclasses
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.encoded import EncodedSplit
from model.encoder import HEADS, LengthAdaptiveModel
from model.front_file import ExportError, Graph, ServedFront
from model.length_config import LengthConfig
from model.onnx_export import OPSET, OUTPUT, input_names, quantise, write_graph
from model.question_answering import least_length
from model.remote_code import LENGTH_CONFIG, MODULE, standalone_source

GRAPH_FILE = "model.onnx"
RUNNER_FILE = "runner.py"
LEAST_LENGTH = 4
"""Tokens that sequences of a graph may be fixed to: special ones and one of each text."""
TOLERANCE = 1e-4
"""Most that an export's logits may differ from the encoder's."""
CHECKED = 3, 6
"""Batches that an export is checked with, and sequences of each."""
ROUNDING = 1e-6
"""Relative noise in the weights, of several roundings' size."""

Logits = Callable[[Mapping[str, Tensor]], Tensor]


def write_transformers_folder(
    folder: Path, model: LengthAdaptiveModel, tokenizer: PreTrainedTokenizerBase, front: ServedFront
) -> float:
    """Write weights, tokenizer, front, and the file that plain transformers runs the chosen length config with.

    config.json names transformers' own class, which is what loads without `trust_remote_code`; its `auto_map` names the
    file's class, which is what loads with it.

    Args:
        folder: Empty.
        model: The encoder, in evaluation mode.
        tokenizer: Its own.
        front: What the folder serves.
    Returns:
        The largest difference between logits of the written folder and of the encoder.
    Raises:
        ExportError: They differ by more than `TOLERANCE`.
    """
    source, name = standalone_source(model.network, model.family, model.task)
    served = copy.copy(model.network)
    served.config = copy.deepcopy(model.network.config)
    served.config.auto_map = {HEADS[model.task].__name__: f"{MODULE}.{name}"}
    setattr(served.config, LENGTH_CONFIG, json.loads(front.chosen.length_config.to_json()))
    served.save_pretrained(folder)
    (folder / f"{MODULE}.py").write_text(source, encoding="utf-8")
    tokenizer.save_pretrained(folder)
    front.write(folder)
    again = LengthAdaptiveModel.from_pretrained(folder).eval()
    remote = _class_of(folder / f"{MODULE}.py", name).from_pretrained(folder).eval()
    chosen = front.chosen.length_config
    return max(
        _largest_difference(model, chosen, lambda batch: again(**batch, length_config=chosen).logits, front.max_length),
        _largest_difference(model, chosen, lambda batch: _joined(remote(**batch)), front.max_length),
    )


def write_onnx_folder(
    folder: Path,
    model: LengthAdaptiveModel,
    tokenizer: PreTrainedTokenizerBase,
    front: ServedFront,
    *,
    fixed_length: int | None = None,
    opset: int = OPSET,
) -> float:
    """Write the float32 graph of the chosen length config, tokenizer, front and a runner that needs neither of us.

    Args:
        folder: Empty.
        model: The encoder, in evaluation mode.
        tokenizer: Its own.
        front: What is known of the model; the folder serves its chosen point alone.
        fixed_length: Tokens that every sequence is padded to; None leaves the length free.
        opset: Of ONNX.
    Returns:
        The largest difference between logits of the graph and of the encoder.
    Raises:
        ExportError: They differ by more than `TOLERANCE`, the fixed length is out of range, or the tokenizer is of no
            use without transformers.
    """
    if fixed_length is not None and not LEAST_LENGTH <= fixed_length <= front.max_length:
        raise ExportError(
            f"fixed length {fixed_length}; choose {LEAST_LENGTH} to {front.max_length} tokens, which the study used."
        )
    longest = fixed_length or front.max_length
    if front.stride is not None and (least := least_length(tokenizer, front.stride)) > longest:
        raise ExportError(
            f"fixed length {longest} leaves no room for a question and new context beside the {front.stride} tokens "
            f"that windows share; choose {least} or more."
        )
    if not tokenizer.is_fast:
        raise ExportError(
            f"{type(tokenizer).__name__} needs transformers; use a model whose folder has tokenizer.json."
        )
    has_types = "token_type_ids" in tokenizer.model_input_names
    graph = Graph(file=GRAPH_FILE, opset=opset, precision="float32", fixed_length=fixed_length, token_types=has_types)
    config = front.chosen.length_config
    write_graph(model, config, folder / GRAPH_FILE, longest=longest, fixed_length=fixed_length is not None, opset=opset)
    tokenizer.save_pretrained(folder)
    dataclasses.replace(front, points=(front.chosen,), max_length=longest, graph=graph).write(folder)
    runner = importlib.util.find_spec("model.onnx_runner")
    assert runner is not None
    assert runner.origin is not None
    shutil.copyfile(runner.origin, folder / RUNNER_FILE)
    session, names = _session(folder / GRAPH_FILE), input_names(model)

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        feed: dict[str, NDArray[np.int64]] = {name: batch[name].numpy() for name in names}
        if fixed_length is not None:
            room = fixed_length - feed["input_ids"].shape[1]
            feed = {name: np.pad(array, ((0, 0), (0, room))) for name, array in feed.items()}
        logits = torch.from_numpy(session.run([OUTPUT], feed)[0])
        return logits if model.reads_first else logits[:, : batch["input_ids"].size(1)]

    return _largest_difference(model, config, run, longest)


def quantise_folder(folder: Path, pad: int, calibration: EncodedSplit | None) -> None:
    """Make an ONNX folder's graph one of int8, statically where there are sequences to calibrate it with."""
    front = ServedFront.read(folder)
    assert front.graph is not None
    path = folder / front.graph.file
    with tempfile.TemporaryDirectory(dir=folder) as exact:
        for file in folder.glob(f"{path.name}*"):  # weights may stand in a file beside it
            file.rename(Path(exact) / file.name)
        quantise(Path(exact) / path.name, path, calibration=calibration, pad=pad, fixed_length=front.graph.fixed_length)
    precision = "int8-dynamic" if calibration is None else "int8-static"
    dataclasses.replace(front, graph=dataclasses.replace(front.graph, precision=precision)).write(folder)


def _session(path: Path) -> Any:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 3
    return InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _class_of(path: Path, name: str) -> Any:
    """A class of a file that is no part of this package; nothing compiled is left beside the file."""
    module = ModuleType(f"_written_{MODULE}")
    sys.modules[module.__name__] = module  # where dataclasses look for their own module
    try:
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return getattr(module, name)


def _joined(output: Any) -> Tensor:
    """The logits of a transformers output as the encoder gives them."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: Tensor = output.logits
    return logits


def _largest_difference(model: LengthAdaptiveModel, config: LengthConfig, run: Logits, longest: int) -> float:
    """Compare logits over random padded batches.

    Where two tokens receive nearly the same attention, rounding decides which of them is kept. Such sequences say
    nothing about an export, so those whose logits move with a noise of that size in the weights are left out.

    Raises:
        ExportError: The largest difference is above `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model).cpu()
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight.mul_(1 + ROUNDING * torch.randn(weight.shape, generator=generator))
    worst, compared = 0.0, 0
    num_batches, size = CHECKED
    for _ in range(num_batches):
        batch = _random_batch(model, size, longest, generator)
        with torch.no_grad():
            expected, moved, got = (
                logits.masked_fill(_padding_of(logits, batch), 0.0)
                for logits in (
                    model(**batch, length_config=config).logits,
                    noisy(**batch, length_config=config).logits,
                    run(batch),
                )
            )
        is_firm_B = (moved - expected).abs().flatten(1).amax(dim=1) < TOLERANCE / 2
        apart_B = (got - expected).abs().flatten(1).amax(dim=1)[is_firm_B].nan_to_num(nan=torch.inf)
        compared += len(apart_B)
        worst = max([worst, *apart_B.tolist()])
    if not compared:
        raise ExportError(
            "The export could not be compared with the encoder, whose own logits are not numbers or follow the least "
            "noise in its weights; nothing was written. Train the model again."
        )
    if worst > TOLERANCE:
        raise ExportError(
            f"The export's logits differ from the encoder's by up to {worst:.2g}, more than {TOLERANCE:g}; nothing was "
            "written. Please report it with the encoder's config.json."
        )
    return worst


def _random_batch(model: LengthAdaptiveModel, size: int, longest: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Sequences of random tokens and lengths, padded on the right."""
    lengths_B = torch.randint(2, longest + 1, (size,), generator=generator)
    shape = (size, int(lengths_B.max()))
    mask_BL = torch.arange(shape[1]) < lengths_B[:, None]
    config = model.network.config
    ids_BL = torch.randint(0, config.vocab_size, shape, generator=generator)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    batch = {"input_ids": ids_BL.where(mask_BL, torch.tensor(pad)), "attention_mask": mask_BL.long()}
    if "token_type_ids" in input_names(model):
        types = getattr(config, "type_vocab_size", 1)
        batch["token_type_ids"] = torch.randint(0, types, shape, generator=generator) * mask_BL
    return batch


def _padding_of(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """What to leave out of (B, C) or (B, L, C) logits."""
    if logits.dim() == 2:
        return torch.zeros_like(logits, dtype=torch.bool)
    return (batch["attention_mask"] == 0)[:, :, None].expand_as(logits)
