"""Packing and planning, against loops that one reads at a glance."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch, pack, zigzag_positions
from megatron_fipo.shapes.micro_batches import micro_batch_order, plan_micro_batches

TOKEN = st.integers(1, 999)
RESPONSE = st.fixed_dictionaries(
    {
        "id": st.integers(0, 2**40),
        "prompt": st.lists(TOKEN, min_size=1, max_size=9),
        "response": st.lists(TOKEN, min_size=1, max_size=15),
        "truncated": st.booleans(),
    }
)
RESPONSES = st.lists(RESPONSE, max_size=6)
LAYOUT = st.sampled_from([(1, 1), (4, 1), (4, 2), (8, 2), (8, 4), (16, 4)])  # alignment, context-parallel ranks


def _rollouts(rows: list[dict[str, Any]]) -> Rollouts:
    """Every number of a response follows from its row, so that a row is recognized wherever it ends up."""
    rollouts = Rollouts.from_responses(
        ids=[r["id"] for r in rows],
        prompts=[r["prompt"] for r in rows],
        responses=[r["response"] for r in rows],
        log_probs=[[-t / 7 for t in r["response"]] for r in rows],
        truncated=[r["truncated"] for r in rows],
        weight_versions=[[t % 3 for t in r["response"]] for r in rows],
    )
    values = torch.tensor([float(sum(r["response"])) for r in rows])
    holes = rollouts.tokens % 5 == 0
    return rollouts.replace(
        rewards=values, accuracy=values % 2, advantages=-values, loss_mask=rollouts.loss_mask & ~holes
    )


def _assert_equal(actual: Rollouts, expected: Rollouts) -> None:
    for f in fields(Rollouts):
        a, e = getattr(actual, f.name), getattr(expected, f.name)
        assert a.dtype == e.dtype, f.name
        assert torch.equal(a, e), f.name


@given(RESPONSES)
def test_from_responses_keeps_every_token(rows: list[dict[str, Any]]) -> None:
    """Prompts and responses stand one after another; only response tokens have a mask and a log-probability."""
    rollouts = Rollouts.from_responses(
        ids=[r["id"] for r in rows],
        prompts=[r["prompt"] for r in rows],
        responses=[r["response"] for r in rows],
        log_probs=[[-t / 7 for t in r["response"]] for r in rows],
        truncated=[r["truncated"] for r in rows],
    )
    assert len(rollouts) == len(rows)
    assert [t.tolist() for t in rollouts.response_tokens()] == [r["response"] for r in rows]
    assert rollouts.tokens.tolist() == [t for r in rows for t in r["prompt"] + r["response"]]
    assert rollouts.loss_mask.tolist() == [
        x for r in rows for x in [False] * len(r["prompt"]) + [True] * len(r["response"])
    ]
    assert torch.equal(rollouts.rollout_log_probs != 0, rollouts.loss_mask)
    assert rollouts.truncated.tolist() == [r["truncated"] for r in rows]
    assert torch.equal(rollouts.weight_versions, torch.where(rollouts.loss_mask, 0, -1).to(torch.int32))


@given(RESPONSES, st.data())
def test_select_is_indexing(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """Any index, repeated or permuted, gives what packing those responses gives."""
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    selected = _rollouts(rows).select(torch.tensor(index, dtype=torch.int64))
    _assert_equal(selected, _rollouts([rows[i] for i in index]))


@given(RESPONSES, st.integers(0, 6))
def test_concatenate_undoes_a_cut(rows: list[dict[str, Any]], cut: int) -> None:
    """The two parts of a cut, either of them possibly empty, concatenate to the whole."""
    whole, everything = _rollouts(rows), torch.arange(len(rows))
    _assert_equal(Rollouts.concatenate([whole.select(everything[:cut]), whole.select(everything[cut:])]), whole)


def _routing(inputs: int, first: int = 0) -> torch.Tensor:
    """[inputs, 2, 3]: token t has the experts first + t to first + t + 2 in one layer, the next ones in the other."""
    token, layer, place = torch.meshgrid(torch.arange(inputs), torch.arange(2), torch.arange(3), indexing="ij")
    return (first + token + layer + place).to(torch.int8)


def _routed(routing: list[torch.Tensor | None]) -> Rollouts:
    """Responses of 4, 3 and 2 tokens with prompts."""
    return Rollouts.from_responses(
        [7, 8, 9], [[1, 2], [3], [4]], [[5, 6], [7, 8], [9]], [[0.0] * 2, [0.0] * 2, [0.0]], [False] * 3, 0, routing
    )


def test_routing_stands_at_its_tokens() -> None:
    """A sequence's last token has none; select and concatenate keep it there, with batches that have none."""
    routed = _routed([_routing(3), _routing(2, 10), _routing(1, 20)])
    assert routed.routing.shape == (9, 2, 3)
    assert routed.routing[:, 0, 0].tolist() == [0, 1, 2, -1, 10, 11, -1, 20, -1]
    assert routed.select(torch.tensor([2, 0])).routing[:, 1, 2].tolist() == [23, -1, 3, 4, 5, -1]
    nothing, unrouted = Rollouts.from_responses([], [], [], [], []), _routed([None] * 3)
    assert unrouted.routing.shape == (9, 0, 0)
    assert Rollouts.concatenate([nothing, unrouted]).routing.shape == (9, 0, 0)
    both = Rollouts.concatenate([nothing, routed, unrouted])
    assert both.routing[:, 0, 0].tolist() == [*routed.routing[:, 0, 0].tolist(), *[-1] * 9]
    without = {name: value for name, value in vars(routed).items() if name != "routing"}
    assert Rollouts.from_state_dict(without).routing.shape == (9, 0, 0)  # of an older release


def test_routing_of_other_tokens_is_an_error() -> None:
    """One row too many or too few names the response."""
    for rows in (1, 3):
        message = f"response 8 has the routing of {rows} tokens, but 2 of its 3 are inputs"
        with pytest.raises(ValueError, match=message):
            _routed([_routing(3), _routing(rows), _routing(1)])


@pytest.mark.parametrize(("alignment", "size", "rank"), [(1, 1, 0), (4, 1, 0), (4, 2, 0), (4, 2, 1)])
def test_packed_routing(alignment: int, size: int, rank: int) -> None:
    """Each position of a micro-batch has the experts of its token; padding has different ones."""
    routed = _routed([_routing(3), _routing(2, 10), _routing(1, 20)])
    found = pack(routed, [1, 0], alignment=alignment, context_size=size, context_rank=rank)
    assert found.routing is not None
    (routing,) = found.routing
    expected = []
    for first, inputs in ((10, 2), (0, 3)):
        for position in _naive_positions(-(-inputs // alignment) * alignment, size, rank):
            expected.append(
                [first + position, first + position + 1, first + position + 2] if position < inputs else [0, 1, 2]
            )
    assert routing[0].tolist() == expected
    assert routing.shape == (2, len(found.input_ids), 3)
    assert pack(_routed([None] * 3), [1, 0]).routing is None


def test_a_response_without_routing_is_not_packed() -> None:
    """Among others that have some; it is named."""
    routed = _routed([_routing(3), None, _routing(1)])
    assert pack(routed, [0, 2]).routing is not None
    with pytest.raises(ValueError, match="response 8 has no routing for some of its tokens, so it cannot be replayed"):
        pack(routed, [0, 1])


def _naive_positions(total: int, size: int, rank: int) -> list[int]:
    chunk = total // (2 * size)
    chunks = [list(range(c * chunk, (c + 1) * chunk)) for c in range(2 * size)]
    return list(range(total)) if size == 1 else chunks[rank] + chunks[2 * size - 1 - rank]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_zigzag_positions(size: int) -> None:
    """Rank r holds chunks r and 2 * size - 1 - r, and the ranks together every position once."""
    held = [zigzag_positions(24, size, rank).tolist() for rank in range(size)]
    assert held == [_naive_positions(24, size, rank) for rank in range(size)]
    assert sorted(p for positions in held for p in positions) == list(range(24))


def test_zigzag_refuses_uneven_chunks() -> None:
    """A length that does not split is named with the split."""
    with pytest.raises(ValueError, match=r"12 tokens cannot be split into 2 x 4"):
        zigzag_positions(12, 4, 0)


def _naive_pack(rows: list[dict[str, Any]], alignment: int, size: int, rank: int) -> dict[str, list[int]]:
    """The definition: a real input position predicts a response token where the next token is one."""
    out: dict[str, list[int]] = {
        n: [] for n in ("input_ids", "position_ids", "hidden_index", "targets", "response_index")
    }
    lengths, response_start = [0], 0
    for row in rows:
        tokens, prompt = row["prompt"] + row["response"], len(row["prompt"])
        total = len(tokens) - 1
        while total % alignment:
            total += 1
        for position in _naive_positions(total, size, rank):
            if position + 1 < len(tokens) and position + 1 >= prompt:
                out["hidden_index"].append(len(out["input_ids"]))
                out["targets"].append(tokens[position + 1])
                out["response_index"].append(response_start + position + 1 - prompt)
            out["input_ids"].append(tokens[position] if position < len(tokens) - 1 else 0)
            out["position_ids"].append(position)
        response_start += len(row["response"])
        lengths.append(lengths[-1] + total)
    return {**out, "cu_seqlens": lengths}


def _pack_all(rows: list[dict[str, Any]], index: list[int], alignment: int, size: int) -> list[MicroBatch]:
    rollouts = _rollouts(rows)
    return [pack(rollouts, index, alignment=alignment, context_size=size, context_rank=r) for r in range(size)]


@given(st.lists(RESPONSE, min_size=1, max_size=6), LAYOUT, st.randoms(use_true_random=False))
def test_pack_equals_the_loop(rows: list[dict[str, Any]], layout: tuple[int, int], random: Any) -> None:
    """Inputs, positions and the predictions of response tokens on every context-parallel rank, for any order."""
    index = random.sample(range(len(rows)), random.randint(1, len(rows)))
    for rank, micro_batch in enumerate(_pack_all(rows, index, *layout)):
        for name, expected in _naive_pack([rows[i] for i in index], *layout, rank).items():
            assert getattr(micro_batch, name).tolist() == expected, name
        assert micro_batch.max_seqlen == int(micro_batch.cu_seqlens.diff().max())


@given(st.lists(RESPONSE, min_size=1, max_size=6), LAYOUT)
def test_every_response_token_is_predicted_once(rows: list[dict[str, Any]], layout: tuple[int, int]) -> None:
    """Over all context-parallel ranks: each response token, the last one included, and nothing else."""
    parts = _pack_all(rows, list(range(len(rows))), *layout)
    index, targets = torch.cat([m.response_index for m in parts]), torch.cat([m.targets for m in parts])
    responses = [t for r in rows for t in r["response"]]
    assert index.sort().values.tolist() == list(range(len(responses)))
    assert targets[index.argsort()].tolist() == responses


@given(st.lists(RESPONSE, min_size=1, max_size=6), LAYOUT)
def test_loss_inputs_do_not_depend_on_the_layout(rows: list[dict[str, Any]], layout: tuple[int, int]) -> None:
    """Mask, offsets, advantages and log-probabilities are whole and the same with and without padding and split."""
    rollouts, index = _rollouts(rows), list(range(len(rows)))[::-1]
    in_response = torch.cat([rollouts.select(torch.tensor([i])).loss_mask[len(rows[i]["prompt"]) :] for i in index])
    lengths = torch.tensor([0] + [len(rows[i]["response"]) for i in index])
    for m in _pack_all(rows, index, *layout):
        assert torch.equal(m.loss_mask, in_response)
        assert torch.equal(m.response_offsets, lengths.cumsum(0))
        assert torch.equal(m.advantages, rollouts.advantages.flip(0))
        assert m.rollout_log_probs.tolist() == pytest.approx([-t / 7 for i in index for t in rows[i]["response"]])
        assert m.sequence_index.tolist() == index
        assert m.num_response_positions == len(in_response)


@pytest.mark.parametrize(("alignment", "size"), [(1, 1), (4, 2), (16, 4)])
def test_an_empty_index_packs_padding(alignment: int, size: int) -> None:
    """One sequence of padding, as long as the alignment, that predicts nothing."""
    for m in _pack_all([{"id": 0, "prompt": [1], "response": [2, 3], "truncated": False}], [], alignment, size):
        assert m.cu_seqlens.tolist() == [0, alignment]
        assert m.max_seqlen == alignment
        assert m.input_ids.shape == m.position_ids.shape == (alignment // size,)
        assert m.num_response_positions == m.targets.numel() == m.hidden_index.numel() == m.advantages.numel() == 0
        assert m.response_offsets.tolist() == [0]


def test_token_values_go_to_their_micro_batch() -> None:
    """`with_token_values` gives the i-th tensor to the i-th micro-batch and leaves the batch it came from alone."""
    rows = [{"id": i, "prompt": [1], "response": [2] * (i + 1), "truncated": False} for i in range(3)]
    batch = TrainBatch(tuple(pack(_rollouts(rows), [i]) for i in range(3)))
    changed = batch.with_token_values(old_log_probs=[torch.full((i + 1,), float(i)) for i in range(3)])
    assert [m.old_log_probs.tolist() for m in changed.micro_batches] == [[0.0], [1.0] * 2, [2.0] * 3]
    assert all(m.old_log_probs is None for m in batch.micro_batches)


PLAN = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(2, 300), max_size=40),
        "replicas": st.integers(1, 4),
        "token_budget": st.integers(304, 1000),
        "alignment": st.sampled_from([1, 4, 16]),
        "multiple": st.sampled_from([1, 2, 3]),
        "order": st.sampled_from(["longest_first", "shortest_first", "longest_middle"]),
    }
)


def _padded(plan: dict[str, Any]) -> list[int]:
    return [-(-(n - 1) // plan["alignment"]) * plan["alignment"] for n in plan["lengths"]]


@given(PLAN)
def test_plan_deals_every_sequence_once(arguments: dict[str, Any]) -> None:
    """Each sequence is in exactly one micro-batch of one replica."""
    plan = plan_micro_batches(**arguments)
    assert len(plan) == arguments["replicas"]
    assert sorted(i for share in plan for b in share for i in b) == list(range(len(arguments["lengths"])))


@given(PLAN)
def test_plan_keeps_replicas_in_step(arguments: dict[str, Any]) -> None:
    """All replicas have the same, positive number of micro-batches, a multiple of what the schedule asks for."""
    counts = {len(share) for share in plan_micro_batches(**arguments)}
    assert len(counts) == 1
    assert min(counts) >= 1
    assert min(counts) % arguments["multiple"] == 0


@given(PLAN)
def test_plan_respects_the_budget_without_waste(arguments: dict[str, Any]) -> None:
    """No micro-batch exceeds the budget; there are no more of them than first-fit's bound on the fullest replica."""
    sizes, budget, multiple = _padded(arguments), arguments["token_budget"], arguments["multiple"]
    plan = plan_micro_batches(**arguments)
    assert all(sum(sizes[i] for i in b) <= budget for share in plan for b in share)
    fullest = max(sum(sizes[i] for b in share for i in b) for share in plan)
    bound = 2 * fullest // budget + 1
    assert len(plan[0]) <= -(-bound // multiple) * multiple


@given(PLAN)
def test_plan_balances_replicas(arguments: dict[str, Any]) -> None:
    """The loads of two replicas differ by one sequence, the longest, at most."""
    sizes = _padded(arguments)
    loads = [sum(sizes[i] for b in share for i in b) for share in plan_micro_batches(**arguments)]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(PLAN)
def test_plan_orders_micro_batches(arguments: dict[str, Any]) -> None:
    """By load, falling or rising as asked, empty ones as the shortest; or rising to the longest round, then falling."""
    sizes, order, multiple = _padded(arguments), arguments["order"], arguments["multiple"]
    for share in plan_micro_batches(**arguments):
        loads = [sum(sizes[i] for i in b) for b in share]
        if order != "longest_middle":
            assert loads == sorted(loads, reverse=order == "longest_first")
            continue
        peak = len(loads) // multiple // 2 * multiple  # the start of the longest round
        assert loads[peak] == max(loads)
        assert loads[:peak] == sorted(loads[:peak])
        assert loads[peak:] == sorted(loads[peak:], reverse=True)


def test_longest_middle() -> None:
    """The two shortest stand at the ends; interleaved, the shorter rounds do."""
    loads = [5, 1, 4, 2, 6, 3]
    assert [loads[i] for i in micro_batch_order(loads, "longest_middle")] == [1, 3, 5, 6, 4, 2]
    assert [loads[i] for i in micro_batch_order(loads, "longest_middle", multiple=2)] == [3, 4, 6, 5, 2, 1]
    assert [loads[i] for i in micro_batch_order(loads, "longest_middle", multiple=6)] == [6, 5, 4, 3, 2, 1]


def test_plan_of_nothing() -> None:
    """Zero sequences still give every replica the schedule's number of (empty) micro-batches."""
    assert plan_micro_batches([], replicas=3, token_budget=10, multiple=2) == [[[], []]] * 3


def test_plan_refuses_a_sequence_beyond_the_budget() -> None:
    """The message says which sequence, its length before and after alignment, and the budget."""
    with pytest.raises(ValueError, match=r"sequence 1 has 62 tokens \(64 after alignment to 8\).*micro_batch 60"):
        plan_micro_batches([10, 62, 30], replicas=2, token_budget=60, alignment=8)
