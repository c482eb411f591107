"""The predictor of quality: what it knows, what it is unsure of, and that both come back as quality."""

import numpy as np
import pytest

from hpo.surrogate import KNOWN_TRIALS, Surrogate

NONE_BEHIND = np.zeros(60)


def quality_of(inputs):
    """Rises steeply, then is flat, as an encoder's does with the tokens it keeps."""
    return 0.85 - 0.3 * np.exp(-6 * inputs.mean(axis=1))


def inputs(count, seed=0):
    return np.random.default_rng(seed).uniform(0.0, 1.0, (count, 3))


@pytest.fixture
def fitted():
    known = inputs(60)
    surrogate = Surrogate()
    for _ in range(3):  # each fit goes on from the kernel of the last
        surrogate.fit(known, quality_of(known), np.zeros(60), NONE_BEHIND)
    return surrogate


def test_what_was_measured_is_predicted_and_almost_certain(fitted):
    quality, deviation = fitted.predict(inputs(60))
    np.testing.assert_allclose(quality, quality_of(inputs(60)), atol=0.005)
    assert (deviation < fitted.predict(inputs(60, seed=1))[1].mean()).mean() > 0.9


def test_new_configs_are_predicted_within_a_few_deviations(fitted):
    new = inputs(200, seed=1)
    quality, deviation = fitted.predict(new)
    assert np.corrcoef(quality, quality_of(new))[0, 1] > 0.95
    assert (np.abs(quality - quality_of(new)) < 3 * deviation).mean() > 0.95


def test_quality_is_surer_where_it_is_high(fitted):
    low, high = np.full((1, 3), 0.05), np.full((1, 3), 0.85)
    assert fitted.predict(high)[1][0] < fitted.predict(low)[1][0] / 2


def test_candidates_vary_together_as_far_as_each_varies(fitted):
    new = inputs(20, seed=2)
    quality, deviation = fitted.predict(new)
    jointly, covariance = fitted.predict_jointly(new)
    np.testing.assert_allclose(jointly, quality)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), deviation, rtol=1e-6)
    near = fitted.predict_jointly(np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.51], [0.05, 0.95, 0.05]]))[1]
    assert near[0, 1] > near[0, 2]


def test_an_unsure_measurement_counts_for_less():
    def predicted(error):
        known = np.vstack([inputs(60), np.full((1, 3), 0.5)])
        quality, errors = np.append(quality_of(inputs(60)), 0.6), np.append(np.zeros(60), error)
        surrogate = Surrogate()
        surrogate.fit(known, quality, errors, np.zeros(61))
        return surrogate.predict(np.full((1, 3), 0.5))[0][0]

    assert predicted(0.001) < predicted(0.05) < predicted(1.0)
    assert predicted(1.0) == pytest.approx(quality_of(np.full((1, 3), 0.5))[0], abs=0.02)


def test_of_too_many_trials_those_nearest_the_front_are_known():
    known = inputs(KNOWN_TRIALS + 200)
    behind = np.where(known[:, 0] < 0.5, 0.0, 1.0)
    surrogate = Surrogate()
    surrogate.fit(known, quality_of(known), np.zeros(len(known)), behind)
    assert len(surrogate._process.X_train_) == KNOWN_TRIALS
    near, far = known[behind == 0], surrogate._process.X_train_
    assert {tuple(row) for row in near} <= {tuple(row) for row in far}


def test_equal_qualities_are_no_obstacle():
    surrogate = Surrogate()
    surrogate.fit(inputs(10), np.full(10, 0.5), np.zeros(10), np.zeros(10))
    quality, deviation = surrogate.predict(inputs(5, seed=1))
    np.testing.assert_allclose(quality, 0.5, atol=1e-6)
    assert np.isfinite(deviation).all()
