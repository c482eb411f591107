"""ONNX graphs of five families equal the encoder; the graph's own code is tested for all in test_families."""

import functools
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from model.encoder import HEADS, LengthAdaptiveModel
from model.front_file import ExportError
from model.graph import GraphPlan, graph_logits
from model.length_config import LengthConfig
from model.onnx_export import padded, quantise, write_graph

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LONGEST, LAYERS = 40, 2
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": 5,
    "pad_token_id": 0,
    **{name: 1 for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")},
}
FAMILIES = {
    "bert": {},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4},
    "mpnet": {},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {"local_attention": 6},
}
DISTILBERT_TOO = ("vocab_size", "max_position_embeddings", "num_labels", "pad_token_id")
POINTS = tuple(LengthConfig.from_retention(retention) for retention in ((0.9, 0.8), (0.6, 0.7), (0.3, 0.5)))
"""Three points whose layers both drop tokens, so that their graphs differ in the table of counts alone."""
FULL = LengthConfig.full(LAYERS)
BATCHES = (19, 30, 3, 30, 12), (40,), (2, 2), (5, 40, 9, 2)
"""Tokens of each batch's sequences."""


def build(model_type, task="classification"):
    sizes = {name: size for name, size in SIZES.items() if model_type != "distilbert" or name in DISTILBERT_TOO}
    config = AutoConfig.for_model(model_type, **{**sizes, **FAMILIES[model_type]})
    config.num_labels = {"question-answering": 2, "regression": 1}.get(task, config.num_labels)
    network = HEADS[task].from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            norm = weight.dim() == 1 and name.endswith("weight")
            weight.normal_(mean=1.0 if norm else 0.0, std=0.3 if weight.dim() > 1 else 0.1, generator=generator)
    model = LengthAdaptiveModel(network, task).eval()
    model.token_score = "value_norm"
    return model


def with_counts(path, old, new, longest=LONGEST):
    """A graph with another config's table of counts, in place of the one it holds."""
    graph = onnx.load(path)
    table = old.count_table(np.arange(longest + 1))
    (home,) = [
        tensor
        for tensor in graph.graph.initializer
        if tuple(tensor.dims) == table.shape and (onnx.numpy_helper.to_array(tensor) == table).all()
    ]
    home.CopyFrom(onnx.numpy_helper.from_array(new.count_table(np.arange(longest + 1)), home.name))
    return graph.SerializeToString()


def check(session, model, config, make_batch, lengths, seed=0, length=None):
    batch = make_batch(lengths, seed)
    names = [given.name for given in session.get_inputs()]
    room = 0 if length is None else length - batch["input_ids"].size(1)
    padded = {name: torch.nn.functional.pad(part, (0, room)) for name, part in batch.items()}
    if "token_type_ids" not in names:
        del batch["token_type_ids"]
    with torch.no_grad():
        expected = model(**batch, length_config=config).logits
    got = torch.from_numpy(session.run(None, {name: padded[name].numpy() for name in names})[0])
    assert got.shape[1:] == (*((padded["input_ids"].size(1),) if not model.reads_first else ()), expected.size(-1))
    for row, count in enumerate(lengths):
        own = slice(None) if model.reads_first else slice(count)
        torch.testing.assert_close(got[row][own], expected[row][own], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def make_graph(tmp_path_factory):
    """Builds a model and the graph of its first point, each once."""

    @functools.cache
    def make(model_type, task):
        model, path = build(model_type, task), tmp_path_factory.mktemp("graph") / "model.onnx"
        write_graph(model, POINTS[0], path, longest=LONGEST)
        return model, path

    return make


@pytest.mark.parametrize(("model_type", "task"), [*itertools.product(FAMILIES, HEADS)])
def test_the_graph_gives_the_encoders_logits_at_full_length_and_three_points(model_type, task, make_graph, make_batch):
    model, path = make_graph(model_type, task)
    for config in (FULL, *POINTS):
        session = onnxruntime.InferenceSession(with_counts(path, POINTS[0], config))
        for seed, lengths in enumerate(BATCHES):
            check(session, model, config, make_batch, lengths, seed)


def test_of_tokens_that_score_alike_the_first_is_kept(make_batch, tmp_path):
    """Tokens left alone in a local window receive all of their own attention, each of them exactly the same."""
    model, config, path = build("modernbert"), LengthConfig.from_retention((0.3, 0.5)), tmp_path / "model.onnx"
    model.network.config.layer_types = ["full_attention", "sliding_attention"]
    model.token_score = "attention"
    write_graph(model, config, path, longest=LONGEST)
    session = onnxruntime.InferenceSession(path)
    for seed in range(20):
        lengths = (40, 35, 29, 22)
        check(session, model, config, make_batch, lengths, seed)
        batch = make_batch(lengths, seed)
        plan = GraphPlan.of(config, LONGEST)
        inputs = batch["input_ids"], batch["attention_mask"], None
        with torch.no_grad():
            got = graph_logits(model.family, model.network, plan, True, *inputs, plan.left_NM)
            torch.testing.assert_close(got, model(*inputs, length_config=config).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("longest", [4, 7])
def test_a_graph_may_be_of_very_short_sequences(longest, make_batch, tmp_path):
    model, path = build("bert"), tmp_path / "model.onnx"
    write_graph(model, POINTS[1], path, longest=longest)
    check(onnxruntime.InferenceSession(path), model, POINTS[1], make_batch, (longest, 3, 2))


def test_the_graph_of_full_length_chooses_no_tokens(make_batch, tmp_path):
    model, path = build("bert", "question-answering"), tmp_path / "model.onnx"
    write_graph(model, FULL, path, longest=LONGEST)
    assert "TopK" not in {node.op_type for node in onnx.load(path).graph.node}
    for seed, lengths in enumerate(BATCHES):
        check(onnxruntime.InferenceSession(path), model, FULL, make_batch, lengths, seed)


def test_more_weights_than_a_file_may_hold_stand_beside_it(make_batch, tmp_path, monkeypatch):
    monkeypatch.setattr("model.onnx_export.PROTOBUF_LIMIT", 0)
    model, path = build("bert"), tmp_path / "model.onnx"
    write_graph(model, POINTS[0], path, longest=LONGEST)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert path.with_name("model.onnx.data").stat().st_size >= model.network.get_input_embeddings().weight.nbytes
    check(onnxruntime.InferenceSession(path), model, POINTS[0], make_batch, BATCHES[0])


@pytest.fixture
def span_graph(make_graph):
    """A span head over a graph that skips no layer and drops in both."""
    return make_graph("bert", "question-answering")


def test_later_layers_work_on_fewer_tokens(span_graph, make_batch):
    """What each feed-forward half widens is looked at while the graph runs."""
    _, path = span_graph
    graph = onnx.load(path)
    widened = [node.output[0] for node in graph.graph.node if node.op_type == "Erf"]
    assert len(widened) == LAYERS
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in widened)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    batch = make_batch((30, 20, 9), 0)
    names = [given.name for given in session.get_inputs()]
    _, *inner = session.run(None, {name: batch[name].numpy() for name in names})
    assert [part.shape[1] for part in inner] == list(POINTS[0].lengths(30))


def optimised_kinds(path, tmp_path):
    """What ONNX Runtime makes of a graph's nodes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options)
    return [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]


def test_residuals_and_layer_norms_are_not_fused(span_graph, tmp_path):
    """The fused kernel is slower than the two."""
    _, path = span_graph
    kinds = optimised_kinds(path, tmp_path)
    assert kinds.count("LayerNormalization") == 2 * LAYERS + 1
    assert kinds.count("Sum") == 2 * LAYERS + 1
    assert "SkipLayerNormalization" not in kinds


def test_layers_reshape_by_constants(span_graph):
    """A shape that is put together from sizes takes runtimes longer than the reshaping."""
    _, path = span_graph
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    shapes = [node.input[1] for node in graph.node if node.op_type == "Reshape"]
    computed = [name for name in shapes if name not in constants]
    assert len(computed) <= 1, "the rows of all sequences, which become sequences again for the head"
    assert {made_by[name] for name in computed} <= {"Concat"}
    assert len(shapes) - len(computed) >= 3 * LAYERS  # heads taken apart, put together, and whom they may see


def test_counts_are_read_at_once(span_graph):
    """As the exporter writes it, a layer's count goes through five operators before it is asked for."""
    _, path = span_graph
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    counts = [made_by[node.input[1]] for node in graph.node if node.op_type == "TopK"]
    assert len(counts) > 1
    assert {count.op_type for count in counts} == {"Gather"}
    assert len({count.input[0] for count in counts}) == 1
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert all(not read.isdisjoint(node.output) for node in graph.node)
    assert {tensor.name for tensor in graph.initializer} <= read


def test_tokens_are_chosen_and_moved_by_one_operator_each(span_graph):
    """Nothing sorts them twice, spreads their places over their vectors' elements, or turns the vectors around."""
    _, path = span_graph
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("TopK") == kinds.count("ScatterND") > 0
    assert kinds.count("GatherND") == 2 * kinds.count("TopK"), "what arrived, and the context that it is joined to"
    assert kinds.count("Expand") <= 1, "where tokens stood"
    assert kinds.count("Transpose") == 4 * LAYERS


def test_gelu_is_written_as_onnx_runtime_fuses_it(span_graph, tmp_path):
    _, path = span_graph
    kinds = optimised_kinds(path, tmp_path)
    assert "Erf" not in kinds
    assert sum(kind in ("Gelu", "BiasGelu") for kind in kinds) == LAYERS


def test_a_fixed_length_makes_every_count_a_constant(make_batch, tmp_path):
    model, path, config = build("bert"), tmp_path / "model.onnx", POINTS[1]
    write_graph(model, config, path, longest=24, fixed_length=True)
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    counts = [constants[node.input[1]] for node in graph.node if node.op_type == "TopK"]
    assert counts, "the first layer should choose tokens"
    assert {int(count.item()) for count in counts} == {config.lengths(24)[0]}
    assert graph.input[0].type.tensor_type.shape.dim[1].dim_value == 24
    session = onnxruntime.InferenceSession(path)
    for lengths in [(24,), (24, 5), (7, 2, 13)]:
        check(session, model, config, make_batch, lengths, length=24)


def test_int8_keeps_what_the_graph_says(span_graph, make_batch, unpadded, tmp_path):
    """Both ways make the weights int8; the answers of a random network stay close."""
    _, path = span_graph
    batch = make_batch((19, 30, 3, 30, 12), 0)
    split = unpadded(batch)
    arrays = padded(split, range(len(split)), pad=0)
    expected = onnxruntime.InferenceSession(path).run(None, arrays)[0]
    for name, calibration in (("dynamic", None), ("static", split)):
        target = tmp_path / f"{name}.onnx"
        quantise(path, target, calibration=calibration)
        kinds = {tensor.data_type for tensor in onnx.load(target).graph.initializer if len(tensor.dims) == 2}
        assert onnx.TensorProto.INT8 in kinds
        got = onnxruntime.InferenceSession(target).run(None, arrays)[0]
        real = arrays["attention_mask"].astype(bool)
        assert np.corrcoef(got[real].ravel(), expected[real].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("opset", [11, 99])
def test_an_opset_out_of_range_is_refused(model, tmp_path, opset):
    with pytest.raises(ExportError, match=rf"opset {opset}; choose 18 to \d+"):
        write_graph(model, LengthConfig.full(4), tmp_path / "model.onnx", longest=16, opset=opset)


def test_without_its_libraries_it_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"onnxscript.*`pip install onnx onnxscript onnx_ir onnxruntime`"):
        write_graph(model, LengthConfig.full(4), tmp_path / "model.onnx", longest=16)


def test_context_is_joined_to_the_tokens_that_stay_alone(make_batch):
    model, config = build("bert", "token-classification"), POINTS[0]
    rows = []
    for layer in model.network.base_model.encoder.layer:
        layer.attention.output.dense.register_forward_hook(lambda _, given, __: rows.append(given[0].size(-2)))
    batch = make_batch((30, 12))
    plan = GraphPlan.of(config, LONGEST)
    with torch.no_grad():
        graph_logits(model.family, model.network, plan, model.reads_first, *batch.values(), plan.left_NM)
    assert rows == list(config.lengths(30))


def test_a_runtime_that_is_too_old_for_an_opset_is_named(tmp_path, monkeypatch):
    class TooOld:
        def __init__(self, *_, **__):
            raise RuntimeError("ONNX opset 18 is under development")

    monkeypatch.setattr(onnxruntime, "InferenceSession", TooOld)
    with pytest.raises(ExportError, match=r"does not read .* opset 18 .*choose a lower one"):
        write_graph(build("bert"), POINTS[0], tmp_path / "model.onnx", longest=LONGEST)
