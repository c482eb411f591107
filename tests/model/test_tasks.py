"""Metrics against their textbook definitions."""

import math

import numpy as np
import pytest

from model.tasks import CLASS_METRICS, choose_metric

METRICS = tuple(metric.name for metric in CLASS_METRICS)


def get_metric(name):
    return choose_metric(CLASS_METRICS, name)


def counted_f1(predictions, labels, positive):
    hits = sum(p == positive == y for p, y in zip(predictions, labels, strict=True))
    predicted, actual = list(predictions).count(positive), list(labels).count(positive)
    return 2 * hits / (predicted + actual) if hits else 0.0


def pearson(predictions, labels):
    return float(np.corrcoef(predictions, labels)[0, 1])


@pytest.fixture(params=[2, 3, 7], ids="{} classes".format)
def predictions_and_labels(request):
    generator = np.random.default_rng(request.param)
    labels = generator.integers(0, request.param, 400)
    guessed = generator.integers(0, request.param, 400)
    return np.where(generator.random(400) < 0.6, labels, guessed), labels


def test_accuracy_is_the_share_of_hits(predictions_and_labels):
    predictions, labels = predictions_and_labels
    hits = sum(int(p == y) for p, y in zip(predictions, labels, strict=True))
    assert get_metric("accuracy").compute(predictions, labels) == pytest.approx(hits / 400)


def test_f1_of_two_classes_is_that_of_class_one_and_else_the_mean_over_classes(predictions_and_labels):
    predictions, labels = predictions_and_labels
    classes = sorted(set(labels.tolist()))
    per_class = [counted_f1(predictions.tolist(), labels.tolist(), positive) for positive in classes]
    expected = per_class[1] if classes == [0, 1] else sum(per_class) / len(classes)
    assert get_metric("f1").over(len(classes)).compute(predictions, labels) == pytest.approx(expected)


def test_f1_of_three_classes_is_the_mean_over_classes_whichever_of_them_occur():
    predictions, labels = np.array([0, 1, 1, 1]), np.array([0, 0, 0, 1])
    per_class = [counted_f1(predictions.tolist(), labels.tolist(), positive) for positive in (0, 1)]
    assert per_class[0] == per_class[1] == 0.5
    f1 = get_metric("f1").over(3)
    assert f1.compute(predictions, labels) == pytest.approx(0.5)
    assert f1.compute(np.array([0, 1, 1, 2]), labels) == pytest.approx((0.5 + 0.0 + 0.0) / 3)
    assert f1.compute(labels[:3], labels[:3]) == 1.0


def test_matthews_correlation_of_two_classes_is_pearsons():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300)
    predictions = np.where(generator.random(300) < 0.8, labels, 1 - labels)
    assert get_metric("matthews_correlation").compute(predictions, labels) == pytest.approx(
        pearson(predictions, labels)
    )


def test_matthews_correlation_of_more_classes_is_the_covariance_quotient(predictions_and_labels):
    predictions, labels = predictions_and_labels
    one_hot = np.eye(7)

    def covariance(left, right):
        left, right = one_hot[left], one_hot[right]
        return float(((left - left.mean(0)) * (right - right.mean(0))).sum())

    expected = covariance(predictions, labels) / math.sqrt(
        covariance(predictions, predictions) * covariance(labels, labels)
    )
    assert get_metric("matthews_correlation").compute(predictions, labels) == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_perfect_predictions_score_one(name, predictions_and_labels):
    _, labels = predictions_and_labels
    assert get_metric(name).compute(labels, labels) == pytest.approx(1.0)


@pytest.mark.parametrize(("prediction", "label"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
def test_constant_predictions_and_labels_score_without_a_warning(prediction, label):
    predictions, labels = np.full(20, prediction), np.full(20, label)
    assert get_metric("accuracy").compute(predictions, labels) == float(prediction == label)
    assert get_metric("f1").compute(predictions, labels) == float(prediction == label == 1)
    assert get_metric("matthews_correlation").compute(predictions, labels) == 0.0


def test_never_predicting_the_positive_class_scores_zero():
    predictions, labels = np.zeros(20, dtype=np.int64), np.arange(20) % 2
    assert get_metric("f1").compute(predictions, labels) == 0.0
    assert get_metric("matthews_correlation").compute(predictions, labels) == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_metrics_know_their_name_and_direction(name):
    assert (get_metric(name).name, get_metric(name).direction) == (name, "maximize")


def test_an_unknown_metric_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="not one of this task; choose one of accuracy, f1, matthews_correlation"):
        get_metric("bleu")


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("num_predictions", "num_labels"), [(3, 4), (0, 0)])
def test_unaligned_or_missing_rows_are_refused(name, num_predictions, num_labels):
    with pytest.raises(ValueError, match="one of each per row"):
        get_metric(name).compute(np.zeros(num_predictions, dtype=np.int64), np.zeros(num_labels, dtype=np.int64))
