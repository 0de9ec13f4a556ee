"""Predictions of whole datasets: a model that gives no numbers gives no predictions."""

import numpy as np
import pytest

from fastlora.data.reading import TaskData
from fastlora.data.tasks import BUILTIN
from fastlora.errors import RunError
from fastlora.multitask.predictor import score_table, write_predictions


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["sst", "sts"])
def test_an_output_that_is_not_finite_is_no_prediction(tmp_path, name, broken):
    task = BUILTIN[name]
    data = TaskData(task, (), np.zeros(3), ["a", "b", "c"], 0, 0, 0)
    outputs = np.ones((3, task.outputs))
    write_predictions(tmp_path / "file.csv", data, outputs)
    (tmp_path / "file.csv").unlink()
    outputs[1, -1] = broken
    for use in (
        lambda: write_predictions(tmp_path / "file.csv", data, outputs),
        lambda: score_table(None, {name: data}, {name: outputs}, "dev"),
    ):
        with pytest.raises(RunError, match=f"task '{name}', example 'b': .* 1 of 3 examples"):
            use()
    assert not any(tmp_path.iterdir())
