"""Predictions and scores, against scipy and by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as reference

from fastlora.data.tasks import BUILTIN
from fastlora.multitask.metrics import (
    class_table,
    class_weights,
    label_texts,
    majority,
    metrics,
    predicted_values,
    score,
)

STS, SST = BUILTIN["sts"], BUILTIN["sst"]
MANY = replace(SST, kind="multilabel", metric="macro_f1")
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
    assert majority(SST, np.array([0.0, 4.0, 4.0]))["accuracy"] == pytest.approx(2 / 3)
    assert majority(SST, np.array([0.0, 4.0, 4.0]))["macro_f1"] == pytest.approx(0.8 / 2)
    assert majority(SST, None) == majority(STS, LABELS) == {}


def test_metrics_of_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, outputs = rng.integers(4, size=60), rng.normal(size=(60, 5))  # no example of class 4
    found, predictions = metrics(SST, outputs, labels), outputs.argmax(1)
    by_class = reference.f1_score(labels, predictions, average=None)
    assert found == pytest.approx(
        {
            "accuracy": reference.accuracy_score(labels, predictions),
            "macro_f1": reference.f1_score(labels, predictions, average="macro"),
            "matthews": reference.matthews_corrcoef(labels, predictions),
            **{f"f1:{name}": value for name, value in enumerate(by_class)},
        }
    )
    table = reference.precision_recall_fscore_support(labels, predictions, zero_division=0)
    precision, recall, _, count = table
    _, rows = class_table(SST, outputs, labels)
    assert rows[1] == ["1", str(count[1]), *(f"{x[1]:.3f}" for x in (precision, recall, by_class))]


def test_metrics_of_several_labels_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, outputs = (rng.random((60, 5)) < 0.3).astype(float), rng.normal(size=(60, 5))
    found = metrics(MANY, outputs, labels)
    assert list(found)[:2] == ["macro_f1", "micro_f1"]
    for name in ("macro", "micro"):
        expected = reference.f1_score(labels, outputs >= 0, average=name)
        assert found[f"{name}_f1"] == pytest.approx(expected)
    assert label_texts(MANY, np.eye(5)[:2] + np.eye(5)[2]) == ["0|2", "1|2"]
    assert label_texts(MANY, predicted_values(MANY, np.full((1, 5), -1.0))) == [""]


def test_spearman_is_that_of_scipy():
    labels, outputs = np.array([0.0, 1, 1, 2, 5]), np.array([[0.5], [1], [1], [4], [3]])
    task = replace(STS, metric="spearman")
    assert score(task, outputs, labels) == pytest.approx(spearmanr(labels, outputs[:, 0])[0])
    assert list(metrics(task, outputs, labels)) == ["spearman", "pearson"]


@pytest.mark.parametrize("unit", [1e-200, 1e30])
def test_no_unit_changes_a_correlation(unit):
    labels, outputs = np.array([0.0, 1, 1, 2, 5]), np.array([[0.5], [1], [1], [4], [3]])
    task = replace(STS, high=STS.high * unit)
    assert metrics(task, outputs * unit, labels * unit) == pytest.approx(
        metrics(STS, outputs, labels)
    )


def test_undefined_metrics_are_none():
    same = metrics(SST, np.eye(5)[[2, 2]], np.array([2.0, 2.0]))
    assert (same["matthews"], same["f1:0"], same["macro_f1"]) == (None, None, 1.0)
    assert set(metrics(MANY, -np.ones((3, 5)), np.zeros((3, 5))).values()) == {None}
    assert metrics(SST, np.full((1, 5), np.nan), np.zeros(1)) == metrics(SST, np.eye(5), None) == {}


def test_class_weights_have_mean_1_over_the_examples():
    labels = np.array([0.0, 0, 0, 1])
    task = replace(SST, labels=("a", "b", "c"), class_weights="auto")
    assert class_weights(task, labels)[:2] == pytest.approx([4 / 6, 2])
    own = class_weights(replace(task, class_weights={"b": 3.0}), labels)
    assert own[1] / own[0] == pytest.approx(3)
    assert own[labels.astype(int)].mean() == pytest.approx(1)
    assert class_weights(SST, labels) is None


@pytest.mark.parametrize(("high", "text"), [(5, "2.5000"), (500, "250.0000"), (5e-4, "0.00025000")])
def test_numbers_are_written_with_the_digits_of_their_range(high, text):
    assert label_texts(replace(STS, high=high), np.array([high / 2])) == [text]
