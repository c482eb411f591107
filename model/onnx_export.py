"""An encoder under one length config as an ONNX graph, in float32 or int8.

Batch and sequence length of the graph are free, or its length is fixed so that every number of tokens kept is a
constant, which TensorRT asks of TopK.
"""

import importlib
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.encoded import EncodedSplit
from model.encoder import LengthAdaptiveModel
from model.front_file import ExportError
from model.graph import GraphPlan, graph_logits
from model.length_config import LengthConfig

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "logits"
OPSET = 18
"""The oldest that torch's exporter writes by itself; ONNX Runtime reads it since 1.14."""
NEEDED = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
PROTOBUF_LIMIT = 2 * 2**30 - 2**20
"""Bytes that one ONNX file may have; more weights go into a file beside it."""
EXAMPLE = (2, 8)
"""Sequences and tokens that a graph of free shape is traced with; what matters is that neither is 0 or 1."""

Arrays = Mapping[str, NDArray[np.int64]]


def require_onnx() -> None:
    """Refuse to go on without the libraries of the `onnx` extra.

    Raises:
        ExportError: One is not installed.
    """
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f"ONNX needs the package {name} ({error}); install it and what goes with it by `pip install "
                f"{' '.join(NEEDED)}`."
            ) from error


def write_graph(
    model: LengthAdaptiveModel,
    length_config: LengthConfig,
    path: Path,
    *,
    longest: int,
    fixed_length: bool = False,
    opset: int = OPSET,
) -> None:
    """Write the float32 graph of a model under one length config.

    Its inputs are those of `INPUTS` that the encoder reads, int64 (B, L), its output is `OUTPUT`. Sequences need 2
    tokens or more, of which the first is real and padding stands on the right. A graph of more than 2 GB keeps its
    weights in a file beside it, called like it and ending in `.data`.

    Args:
        model: The encoder, in evaluation mode.
        length_config: Tokens left after each layer.
        path: Of the file.
        longest: Most tokens of a sequence.
        fixed_length: Whether L is `longest`, always.
        opset: Of ONNX, `OPSET` or later.
    Raises:
        ExportError: The opset is too old or too new, or a library is not installed.
    """
    require_onnx()
    import onnx
    import onnxruntime

    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise ExportError(
            f"opset {opset}; choose {OPSET} to {newest}, which the installed onnx {onnx.__version__} has."
        )
    if not fixed_length:
        longest = max(longest, EXAMPLE[1])  # what is traced is within the bounds of what may come
    module = _Graph(model, GraphPlan.of(length_config, longest, fixed_length=fixed_length))
    names = input_names(model)
    size, length = EXAMPLE if not fixed_length else (EXAMPLE[0], longest)
    example = {name: torch.ones(size, length, dtype=torch.int64) for name in names}  # one for all would be one input
    batch: Any = torch.export.Dim("batch")
    shape = {0: batch} if fixed_length else {0: batch, 1: torch.export.Dim("length", min=2, max=longest)}
    with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        program = torch.export.export(
            module, (), kwargs=example, dynamic_shapes=dict.fromkeys(names, shape), strict=False
        )
        exported = torch.onnx.export(
            program, (), opset_version=opset, input_names=names, output_names=[OUTPUT], optimize=False, verbose=False
        )
        assert exported is not None
        raw, is_large = Path(folder) / "raw.onnx", weight_bytes(model) > PROTOBUF_LIMIT
        _settle_shapes(exported.model)
        exported.save(str(raw), external_data=is_large)
        # What depends on weights alone, such as queries', keys' and values' joined projection, is computed now.
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        if is_large:
            key = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(key, f"{path.name}.data")
        try:
            onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a class of its own for every code
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} does not read what was written in opset {opset} "
                f"({str(error).splitlines()[0]}); choose a lower one, down to {OPSET}, or install a newer onnxruntime."
            ) from error
    _tidy(path)


def quantise(
    path: Path, target: Path, *, calibration: EncodedSplit | None = None, pad: int = 0, fixed_length: int | None = None
) -> None:
    """Write an int8 version of a graph: weights of its products per output channel, and what they are multiplied with.

    Args:
        path: The float32 graph.
        target: The int8 one.
        calibration: Sequences that fix the ranges of what layers pass on (static); None measures them anew in each
            product (dynamic).
        pad: Id of the padding token.
        fixed_length: Tokens that sequences are padded to; None where the length is free.
    """
    require_onnx()
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    external = path.stat().st_size + sum(file.stat().st_size for file in path.parent.glob(f"{path.name}.data"))
    options: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "per_channel": True,
        "reduce_range": False,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": external > PROTOBUF_LIMIT,
        "extra_options": {"MatMulConstBOnly": True},
    }
    with _quiet():
        if calibration is None:
            quantize_dynamic(path, target, **options)
            return
        names = [given.name for given in InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()]
        reader = _Calibration(calibration, names, pad, fixed_length)
        quantize_static(path, target, reader, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, **options)


def input_names(model: LengthAdaptiveModel) -> list[str]:
    """Those of `INPUTS` that an encoder reads."""
    has_types = getattr(model.network.config, "type_vocab_size", 0) > 1
    return [name for name in INPUTS if has_types or name != "token_type_ids"]


def weight_bytes(model: LengthAdaptiveModel) -> int:
    """Memory of the weights."""
    return sum(weight.nbytes for weight in model.network.parameters())


def padded(
    split: EncodedSplit, sequences: Sequence[int] | NDArray[np.int64], pad: int, length: int | None = None
) -> dict[str, NDArray[np.int64]]:
    """Sequences of a split as one batch, (B, L) each, padded on the right.

    Args:
        split: Where they are from.
        sequences: Their numbers.
        pad: Id of the padding token.
        length: L; None takes the longest one's, but no less than the 2 tokens that a graph needs.
    """
    counts = split.num_tokens[np.asarray(sequences, dtype=np.int64)]
    shape = (len(counts), length or max(2, int(counts.max())))
    arrays = {name: np.zeros(shape, dtype=np.int64) for name in INPUTS}
    arrays["input_ids"][:] = pad
    for row, (number, count) in enumerate(zip(sequences, counts, strict=True)):
        arrays["input_ids"][row, :count] = split.input_ids[number]
        arrays["token_type_ids"][row, :count] = split.token_type_ids[number]
        arrays["attention_mask"][row, :count] = 1
    return arrays


class _Graph(nn.Module):
    """What is traced: `graph_logits` of one model."""

    def __init__(self, model: LengthAdaptiveModel, plan: GraphPlan) -> None:
        super().__init__()
        self.network = model.network
        self.left_NM: Tensor
        self.register_buffer("left_NM", plan.left_NM)
        self.family, self.plan, self.reads_first = model.family, plan, model.reads_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """(B, L) each to logits."""
        batch = (input_ids, attention_mask, token_type_ids)
        return graph_logits(self.family, self.network, self.plan, self.reads_first, *batch, self.left_NM, for_onnx=True)


@dataclass
class _Calibration:
    """Feeds sequences one by one, as the quantiser asks for them."""

    split: EncodedSplit
    names: Sequence[str]
    pad: int
    fixed_length: int | None
    done: int = 0

    def get_next(self) -> dict[str, NDArray[np.int64]] | None:
        """The next batch; None after the last."""
        if self.done == len(self.split):
            return None
        batch = padded(self.split, [self.done], self.pad, self.fixed_length)
        self.done += 1
        return {name: batch[name] for name in self.names}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks, which speak to their own programmers, off the user's screen."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", None)  # the quantiser speaks through the root
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _settle_shapes(model: Any) -> None:
    """Give reshapings of free sizes a constant shape where one says the same: 0 for "as it was", -1 for "the rest".

    The exporter has each of them put its shape together from the inputs' sizes, which takes runtimes longer than the
    reshaping.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[1].is_initializer():
            continue
        before, after = (list(value.shape or ()) for value in (node.inputs[0], node.outputs[0]))
        shape = [
            size if isinstance(size, int) else 0 if [size] == before[at : at + 1] else -1
            for at, size in enumerate(after)
        ]
        if shape and shape.count(-1) <= 1:
            constant = onnx_ir.tensor(np.array(shape, dtype=np.int64), name=f"{node.outputs[0].name}_shape")
            value = onnx_ir.Value(name=constant.name, const_value=constant)
            model.graph.register_initializer(value)
            node.replace_input_with(1, value)
            node.attributes.pop("allowzero", None)  # by which 0 would be a size
    RemoveUnusedNodesPass()(model)


def _tidy(path: Path) -> None:
    """Leave out what the optimiser adds to a graph and readers stumble over, and write it for ONNX Runtime.

    It asks for all the operators' domains that it knows, and tells the shapes of weights a second time, which are wrong
    once the quantiser has turned a weight around.
    """
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = onnx.load(path, load_external_data=False)
    _read_counts_at_once(graph.graph)
    graph = onnx_ir.to_proto(RemoveUnusedNodesPass()(onnx_ir.from_proto(graph)).model)
    _halve_last(graph.graph)
    _sum_residuals(graph.graph)
    used = {re.sub(r"^ai\.onnx$", "", node.domain) for node in graph.graph.node}
    kept = [entry for entry in graph.opset_import if entry.domain in used]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)
    weights = {tensor.name for tensor in graph.graph.initializer}
    shapes = [value for value in graph.graph.value_info if value.name not in weights]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(shapes)
    onnx.save(graph, path)


def _read_counts_at_once(graph: Any) -> None:
    """Take how many tokens a layer hands on straight from all counts, as the list of one that operators ask for.

    The exporter makes the count a number, that a list, and of its number another list: five operators a layer, each of
    which takes a runtime about as long as one that does something.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    dimensions = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    taken_by = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Gather" and dimensions.get(node.input[0]) == 1 and dimensions.get(node.output[0]) == 0
    }
    list_of: dict[str, str] = {}
    same: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        source, output = node.input[0], node.output[0]
        if node.op_type == "Concat" and len(node.input) == 1:
            same[output] = source
        elif node.op_type == "Gather" and source in list_of.values():
            list_of[output] = source
        elif node.op_type != "Reshape" or not _is_list(constants.get(node.input[1])):
            continue
        elif source in list_of:
            same[output] = list_of[source]
        elif source in taken_by and taken_by[source].input[1] in constants:
            counts, place = taken_by[source].input
            places = numpy_helper.from_array(numpy_helper.to_array(constants[place]).reshape(1), f"{output}_place")
            graph.initializer.append(places)
            node.op_type, node.input[:] = "Gather", [counts, places.name]
            del node.attribute[:]
            list_of[source] = output


def _is_list(shape: Any) -> bool:
    """Whether a constant is the shape of a list."""
    return shape is not None and list(shape.dims) == [1]


def _halve_last(graph: Any) -> None:
    """Turn x · (0.5 · (1 + erf)) into (x · (1 + erf)) · 0.5, which ONNX Runtime computes as one GELU."""
    made_by = {output: node for node in graph.node for output in node.output}
    read_by: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            read_by.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type != "Mul":
            continue
        for half, added in (node.input, node.input[::-1]):
            before = made_by.get(added)
            if before is None or before.op_type != "Add" or half in made_by:
                continue
            is_gelu = any(name in made_by and made_by[name].op_type == "Erf" for name in before.input)
            last = read_by.get(node.output[0], [])
            if is_gelu and len(last) == 1 and last[0].op_type == "Mul":
                (given,) = (name for name in last[0].input if name != node.output[0])
                node.input[:] = [given, added]
                last[0].input[:] = [node.output[0], half]
                break


def _sum_residuals(graph: Any) -> None:
    """Turn the addition before a LayerNorm into a sum of two, which ONNX Runtime does not fuse with it.

    Its fused kernel takes 2.5 to 7 times as long as the two on their own (1.31, two cores with AVX-512).
    """
    normed = {node.input[0] for node in graph.node if node.op_type == "LayerNormalization"}
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Add" and node.output[0] in normed and not weights.intersection(node.input):
            node.op_type = "Sum"
