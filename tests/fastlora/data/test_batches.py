"""The plan of an epoch and the tensors of a batch, against plain Python."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.data.batches import Span, _shares, collate, eval_batches, plan_epoch
from fastlora.data.reading import TaskData
from fastlora.data.tasks import BUILTIN
from fastlora.data.tokenizer import Encoded


def task_data(name, lengths, seed=0, joint=False):
    """Make a TaskData whose example i has the given number of tokens in each sequence."""
    task = BUILTIN[name]
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    columns = []
    for column in range(1 if joint or not task.is_pair else 2):
        offsets = np.concatenate([[0], np.cumsum(lengths + column)]).astype(np.int64)
        ids = rng.integers(1, 1000, offsets[-1]).astype(np.int32)
        types = (ids % 2 if joint else 0 * ids).astype(np.int8)
        columns.append(Encoded(ids, offsets, types, 0))
    labels = rng.integers(0, 2, len(lengths)).astype(np.float32)
    ids = [str(i) for i in range(len(lengths))]
    return TaskData(task, tuple(columns), labels, ids, 0, 0, 0)


def three_tasks():
    rng = np.random.default_rng(1)
    sizes = {"sst": 300, "quora": 900, "sts": 200}
    return {name: task_data(name, rng.integers(4, 60, size)) for name, size in sizes.items()}


def tokens_of(datasets, plan_batch):
    data = list(datasets.values())
    return sum(
        int(column.offsets[example + 1] - column.offsets[example])
        for task, example in plan_batch
        for column in data[task].columns
    )


def sequence(data, column, example):
    encoded = data.columns[column]
    return encoded.ids[encoded.offsets[example] : encoded.offsets[example + 1]]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=60), min_size=1, max_size=4),
    budget=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_an_epoch_has_every_example_once_within_the_budget(lengths, budget, seed):
    datasets = {
        name: task_data(name, of_task) for name, of_task in zip(BUILTIN, lengths, strict=False)
    }
    plan = plan_epoch(datasets, budget, seed, epoch=0)
    found = sorted(map(tuple, np.concatenate(plan).tolist()))
    expected = [(t, i) for t, of_task in enumerate(lengths) for i in range(len(of_task))]
    assert found == expected
    assert all(len(b) == 1 or tokens_of(datasets, b) <= budget for b in plan)


def test_the_plan_is_a_function_of_seed_and_epoch():
    datasets = three_tasks()
    same, again, later, other = (
        plan_epoch(datasets, 512, seed, epoch) for seed, epoch in [(3, 1), (3, 1), (3, 2), (4, 1)]
    )
    assert len(same) == len(again)
    assert all(np.array_equal(a, b) for a, b in zip(same, again, strict=True))
    for different in (later, other):
        assert not np.array_equal(np.concatenate(same), np.concatenate(different))


def test_batches_are_full_and_hold_similar_lengths():
    datasets = three_tasks()
    plan = plan_epoch(datasets, 1024, seed=0, epoch=0)
    tokens = [tokens_of(datasets, batch) for batch in plan]
    assert len(plan) <= 1.06 * sum(tokens) / 1024
    # The last batch of the epoch holds what is left.
    assert sorted(tokens)[1] > 0.85 * 1024
    batches = [collate(datasets, batch) for batch in plan]
    cells = sum(batch.input_ids.numel() for batch in batches)
    assert sum(tokens) > 0.9 * cells
    assert sum(len(batch.spans) == 3 for batch in batches) > 0.75 * len(batches)


def test_batches_are_not_in_order_of_length():
    datasets = three_tasks()
    widths = [
        collate(datasets, b).input_ids.shape[1] for b in plan_epoch(datasets, 512, seed=0, epoch=0)
    ]
    assert abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.4


def test_a_tiny_temperature_takes_the_largest_task():
    assert _shares(np.array([300, 900, 200]), "1e-320").tolist() == [0, 1400, 0]


@pytest.mark.parametrize(
    ("sampling", "power"),
    [("proportional", 1.0), ("sqrt", 0.5), ("uniform", 0.0), ("4", 0.25)],
)
def test_sampling_shares(sampling, power):
    datasets = three_tasks()
    rows = np.concatenate(plan_epoch(datasets, 512, 0, 0, sampling))
    weights = np.array([300, 900, 200]) ** power
    assert np.abs(np.bincount(rows[:, 0]) - 1400 * weights / weights.sum()).max() < 1
    assert len(rows) == 1400
    for task, data in enumerate(datasets.values()):
        # Wrapping around a permutation: nothing comes twice more often than anything else.
        times = np.bincount(rows[rows[:, 0] == task, 1], minlength=len(data))
        assert times.max() - times.min() <= 1


def test_a_tasks_weight_multiplies_its_share():
    datasets = three_tasks()
    heavier = replace(datasets["sts"].task, weight=3.0)
    datasets["sts"] = replace(datasets["sts"], task=heavier)
    rows = np.concatenate(plan_epoch(datasets, 512, 0, 0))
    assert np.bincount(rows[:, 0]).tolist() == [233, 700, 467]
    datasets["sst"] = replace(datasets["sst"], task=replace(datasets["sst"].task, weight=1e-9))
    assert 0 not in np.concatenate(plan_epoch(datasets, 512, 0, 0))[:, 0]


@pytest.mark.parametrize("positions", [None, 64])
def test_several_labels_are_rows_of_the_batch(positions):
    data = task_data("sst", [5, 9, 3])
    labels = np.array([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    many = replace(data.task, kind="multilabel", labels=("a", "b", "c"), metric="macro_f1")
    batch = collate(
        {"many": replace(data, task=many, labels=labels)}, np.array([[0, 1], [0, 0]]), positions
    )
    assert batch.labels["many"][:2].tolist() == labels[[1, 0]].tolist()
    assert not batch.labels["many"][2:].any()
    assert len(batch.labels["many"]) == batch.spans[0].count >= 2


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    sampling=st.sampled_from(["proportional", "sqrt", "uniform"]),
)
def test_shares_add_up(sizes, sampling):
    shares = _shares(np.array(sizes), sampling)
    assert shares.sum() == sum(sizes)
    assert shares.min() >= 0
    assert sampling != "proportional" or shares.tolist() == sizes


def test_collate_lays_out_every_token():
    datasets = {"sst": task_data("sst", [5, 9, 3]), "sts": task_data("sts", [4, 7])}
    plan = np.array([[1, 1], [0, 2], [1, 0], [0, 1]])
    batch = collate(datasets, plan)
    sts = sum(len(sequence(datasets["sts"], column, i)) for column in (0, 1) for i in (0, 1))
    assert batch.spans == (Span("sst", 0, 2, 1, (0, 12)), Span("sts", 2, 2, 2, (12, 12 + sts)))
    rows = [
        ("sst", 0, 2),
        ("sst", 0, 1),
        ("sts", 0, 1),
        ("sts", 0, 0),
        ("sts", 1, 1),
        ("sts", 1, 0),
    ]
    assert batch.input_ids.shape == (6, 9)
    for row, (name, column, example) in enumerate(rows):
        expected = sequence(datasets[name], column, example)
        assert batch.input_ids[row, : len(expected)].tolist() == expected.tolist()
        assert batch.attention_mask[row].sum() == len(expected)
        assert batch.attention_mask[row, : len(expected)].all()
        assert not batch.input_ids[row, len(expected) :].any()
    assert batch.indices["sst"].tolist() == [2, 1]
    assert batch.labels["sst"].dtype == torch.int64
    assert batch.labels["sts"].dtype == torch.float32
    positions = datasets["sts"].labels[[1, 0]] / 5  # in the range from 0 to 5
    assert torch.equal(batch.labels["sts"], torch.from_numpy(positions))
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.bool)
    assert not batch.token_type_ids.any()


def test_joint_pairs_carry_types_beside_tasks_without():
    datasets = {"sst": task_data("sst", [5]), "quora": task_data("quora", [7, 6], joint=True)}
    batch = collate(datasets, np.array([[0, 0], [1, 1]]))
    expected = sequence(datasets["quora"], 0, 1) % 2
    assert batch.spans[1] == Span("quora", 1, 1, 1, (5, 5 + len(expected)))
    assert batch.token_type_ids[1].tolist() == expected.tolist()
    assert not batch.token_type_ids[0].any()
    assert batch.token_type_ids.dtype == torch.int64


def test_padding_makes_round_numbers_of_tokens():
    """From 32 to 64 tokens, every second number; real tokens come first, in order."""
    datasets = {"sst": task_data("sst", [11, 9, 14, 3])}
    bare = collate(datasets, np.array([[0, 0], [0, 1], [0, 2]]))  # 34 of 42
    assert len(bare.layout.index) == 34
    batch = collate(datasets, np.array([[0, 0], [0, 1], [0, 2], [0, 3]]))
    real = batch.attention_mask.flatten().nonzero()[:, 0]
    assert batch.spans[0].tokens == (0, 37)
    assert torch.equal(batch.layout.index[:37], real)
    assert len(batch.layout.index) == 38 and len(set(batch.layout.index.tolist())) == 38


def test_labels_that_are_large_against_their_range_keep_their_positions():
    """fp32 cannot tell the days of a month written as 20231201 apart."""
    data = task_data("sts", [5, 6, 7])
    task = replace(data.task, low=20231201.0, high=20231231.0)
    moved = replace(data, task=task, labels=np.array([20231201.0, 20231202.0, 20231231.0]))
    labels = collate({"sts": moved}, np.array([[0, 0], [0, 1], [0, 2]])).labels["sts"]
    assert labels.tolist() == pytest.approx([0, 1 / 30, 1])


def test_a_batch_without_labels():
    data = task_data("sst", [5, 6])
    unlabelled = TaskData(data.task, data.columns, None, data.ids, 0, 0, 0)
    assert collate({"sst": unlabelled}, np.array([[0, 1]])).labels == {}


def test_to_moves_every_tensor():
    datasets = {"quora": task_data("quora", [7, 6], joint=True)}
    batch = collate(datasets, np.array([[0, 0], [0, 1]])).to("meta")
    tensors = [batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.labels["quora"]]
    tensors += [batch.layout.index, batch.layout.mask]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.indices["quora"].tolist() == [0, 1]


def test_evaluation_sees_every_example_once():
    datasets = three_tasks()
    seen = {name: [] for name in datasets}
    for batch in eval_batches(datasets, 700):
        assert batch.attention_mask.sum() <= 700
        for name, indices in batch.indices.items():
            seen[name] += indices.tolist()
            labels = datasets[name].labels[indices]
            scale = 5 if name == "sts" else 1
            np.testing.assert_allclose(scale * batch.labels[name].numpy(), labels)
    for name, data in datasets.items():
        assert sorted(seen[name]) == list(range(len(data)))
