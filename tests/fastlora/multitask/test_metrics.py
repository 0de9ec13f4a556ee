"""Predictions and scores, against scipy and by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import pearsonr

from fastlora.data.tasks import BUILTIN
from fastlora.multitask.metrics import label_texts, majority, predicted_values, score

STS, SST = BUILTIN["sts"], BUILTIN["sst"]
LABELS = np.array([0.0, 1.0, 2.0], np.float32)


def test_accuracy_counts_the_largest_logits():
    assert score(SST, np.eye(5, dtype=np.float32)[[0, 1, 4]], LABELS) == pytest.approx(2 / 3)


def test_the_score_is_that_of_the_clipped_predictions():
    outputs = np.array([[-3.0], [2.0], [9.0]], np.float32)
    predictions = predicted_values(STS, outputs)
    assert predictions.tolist() == [0, 2, 5]
    expected = pearsonr(predictions, LABELS).statistic
    assert score(STS, outputs, LABELS) == pytest.approx(expected)
    assert expected != pytest.approx(pearsonr(outputs[:, 0], LABELS).statistic, abs=1e-3)


@pytest.mark.parametrize("outputs", [[1.0, 1.0, 1.0], [1.0], [7.0, 8.0, 9.0], [1.0, np.nan, 2.0]])
def test_there_is_no_pearson_of_one_or_equal_or_broken_predictions(outputs):
    assert score(STS, np.array(outputs)[:, None], np.arange(len(outputs))) is None


def test_majority():
    assert majority(SST, np.array([0.0, 4.0, 4.0])) == pytest.approx(2 / 3)
    assert majority(SST, None) is None
    assert majority(STS, LABELS) is None


@pytest.mark.parametrize(("high", "text"), [(5, "2.5000"), (500, "250.0000"), (5e-4, "0.00025000")])
def test_numbers_are_written_with_the_digits_of_their_range(high, text):
    assert label_texts(replace(STS, high=high), np.array([high / 2])) == [text]
