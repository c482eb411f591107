"""A batch that is cut up gives what its graph gives for one sequence after the other."""

import itertools
import threading

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from model.onnx_runner import SplitSession, cut  # noqa: E402

WIDTH = 3


@pytest.fixture(params=["reads_all", "reads_first"])
def graph(request, tmp_path):
    """A graph whose outputs tell sequences, their places and how long they are taken for; (B, L, 3) or (B, 3)."""
    ids, mask = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    )
    last = onnx.numpy_helper.from_array(np.array([2]), "last")
    middle = onnx.numpy_helper.from_array(np.array([1]), "middle")
    wide = onnx.numpy_helper.from_array(np.array([1, 1, WIDTH]), "wide")
    nodes = [
        onnx.helper.make_node("ReduceSum", ["attention_mask", "middle"], ["count"]),  # (B, 1)
        onnx.helper.make_node("Mul", ["input_ids", "count"], ["told"]),
        onnx.helper.make_node("Unsqueeze", ["told", "last"], ["deep"]),
        onnx.helper.make_node("Tile", ["deep", "wide"], ["all"]),
        onnx.helper.make_node("ReduceSum", ["all", "middle"], ["first"], keepdims=0),
    ]
    shape = {"reads_all": ["batch", "length", WIDTH], "reads_first": ["batch", WIDTH]}[request.param]
    output = onnx.helper.make_tensor_value_info(request.param[6:], onnx.TensorProto.INT64, shape)
    made = onnx.helper.make_graph(nodes, "g", [ids, mask], [output], [last, middle, wide])
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def batch_of(counts, length=None):
    ids, mask = np.zeros((2, len(counts), length or max(counts)), dtype=np.int64)
    for row, count in enumerate(counts):
        ids[row, :count], mask[row, :count] = 100 * (row + 1) + np.arange(count), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("counts", [(3, 9, 2, 9, 5), (4,), (7, 7), (2, 30, 2, 2, 2, 2)])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_each_sequence_gets_its_own_output(graph, counts, threads):
    plain = onnxruntime.InferenceSession(graph)
    for length in (None, 32):
        outputs = SplitSession(graph, fixed_length=length, threads=threads).run(batch_of(counts, length))
        assert len(outputs) == len(counts)
        for row, (count, output) in enumerate(zip(counts, outputs, strict=True)):
            alone = {name: array[row : row + 1] for name, array in batch_of(counts).items()}
            expected = plain.run(None, alone)[0][0]
            own = slice(count) if expected.ndim == 2 else slice(None)
            np.testing.assert_array_equal(output[own], expected[own])
            assert length is None or expected.ndim == 1 or len(output) == length


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(graph, threads):
    with pytest.raises(ValueError, match=f"threads={threads}"):
        SplitSession(graph, threads=threads)


def test_threads_share_a_session(graph):
    session = SplitSession(graph, threads=2)
    batches = [batch_of(np.random.default_rng(seed).integers(2, 20, 8).tolist()) for seed in range(8)]
    expected = [session.run(batch) for batch in batches]
    wrong = []

    def ask(number):
        for _ in range(20):
            outputs = session.run(batches[number])
            if not all(np.array_equal(*pair) for pair in zip(outputs, expected[number], strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_parts_hold_every_sequence_once_and_the_largest_is_as_small_as_can_be():
    generator = np.random.default_rng(0)
    for _ in range(300):
        counts = generator.integers(1, 60, generator.integers(1, 9))
        most = int(generator.integers(1, 5))
        parts = cut(counts, most)
        assert 1 <= len(parts) <= most
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(counts)))
        assert max(len(part) * counts[part].max() for part in parts) == smallest(sorted(counts.tolist()), most)


def smallest(counts, most):
    """Padded tokens of the largest part, in the best of all ways to cut ascending counts."""
    every_edge = range(1, len(counts))
    ways = (edges for parts in range(most) for edges in itertools.combinations(every_edge, parts))
    cuts = ([0, *edges, len(counts)] for edges in ways)
    return min(max((end - start) * counts[end - 1] for start, end in itertools.pairwise(way)) for way in cuts)
