"""The planner's arithmetic against published counts, closed forms and volumes counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_fipo.config import ParallelConfig
from megatron_fipo.scaling.cost.elements import num_parameters
from megatron_fipo.scaling.cost.flops import active_weights, model_flops, parameters
from megatron_fipo.scaling.cost.hardware import find_hardware
from megatron_fipo.scaling.cost.model_shapes import PUBLISHED, find_model, make_shape
from megatron_fipo.scaling.cost.sequence_lengths import Sequences
from megatron_fipo.scaling.cost.step_cost import PASS_PARTS, CostModel
from megatron_fipo.scaling.cost.workload import equal_batch, estimated_batch, packed_batch
from megatron_fipo.scaling.pipeline.pipeline_time import pipeline_estimate, pipeline_time
from tests.scaling.shapes import SMALL, layout, round_hardware

# Parameters of the checkpoints on the Hugging Face hub (safetensors' metadata) or of the papers
PARAMETERS = {
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_shapes_have_the_published_parameters(name: str) -> None:
    """Matrices alone are all but 0.05% (norms, biases, routers) of each model."""
    assert parameters(PUBLISHED[name]) == pytest.approx(PARAMETERS[name], rel=5e-4)


def test_parameters_are_those_of_the_memory_model() -> None:
    """Up to norms, biases and the rows that pad the vocabulary."""
    for name in ("qwen2.5-7b", "qwen3-0.6b", "llama3-8b", "qwen3-30b-a3b"):
        shape = PUBLISHED[name]
        exact = num_parameters(shape, ParallelConfig(), stage=0)
        assert parameters(shape) == pytest.approx(exact, rel=5e-4)


def test_flops_are_korthikantis() -> None:
    """72 B L s h^2 (1 + s / 6h + V / 12 h L) for GPT-3 with all query-key pairs (arXiv 2205.05198, appendix A)."""
    gpt, s, h, n, v = PUBLISHED["gpt3-175b"], 2048, 12288, 96, 51200
    expected = 72 * n * s * h**2 * (1 + s / (6 * h) + v / (12 * h * n))
    assert model_flops(gpt, s, s**2, causal=False) == pytest.approx(expected, rel=1e-12)


def test_flops_of_published_runs() -> None:
    """Llama 3 405B: 3.8e25 for 15.6e12 tokens (arXiv 2407.21783, 3.2); GPT-3: 3.14e23 for 300e9 (2005.14165, D)."""
    llama = 6 * active_weights(PUBLISHED["llama3-405b"]) * 15.6e12
    assert llama == pytest.approx(3.8e25, rel=0.01)
    assert 6 * active_weights(PUBLISHED["gpt3-175b"]) * 300e9 == pytest.approx(3.14e23, rel=0.01)


def test_only_active_experts_count() -> None:
    """Qwen3-30B-A3B uses 3.3e9 of its 30.5e9 parameters a token, the embedding among them; DeepSeek-V3 37e9."""
    qwen = PUBLISHED["qwen3-30b-a3b"]
    assert active_weights(qwen) + qwen.hidden_size * qwen.vocab_size == pytest.approx(3.3e9, rel=0.02)
    assert active_weights(PUBLISHED["deepseek-v3"]) == pytest.approx(37e9, rel=0.02)


# Pipeline


@pytest.mark.parametrize(("p", "m", "v"), [(1, 5, 1), (4, 4, 1), (4, 64, 1), (8, 16, 3), (4, 12, 2), (16, 256, 1)])
def test_equal_stages_have_the_closed_form(p: int, m: int, v: int) -> None:
    """(m + (p - 1) / v) (f + b), by the replay, its extrapolation and the estimate."""
    forward, backward = [1 / v] * (p * v), [2 / v] * (p * v)
    expected = 3 * (m + (p - 1) / v)
    assert pipeline_time(forward, backward, m, v) == pytest.approx(expected, rel=1e-12)
    assert pipeline_time(forward, backward, [1.0] * m, v) == pytest.approx(expected, rel=1e-12)
    assert pipeline_estimate(forward, backward, m, v) == pytest.approx(expected, rel=1e-12)


def test_two_unequal_stages_by_hand() -> None:
    """Stage 1 waits 1 for its first input, works 2 x 6 without a pause; its last gradient costs stage 0 2 more."""
    assert pipeline_time([1, 2], [2, 4], 2) == 1 + 2 * 6 + 2
    assert pipeline_time([1, 2], [2, 4], 2, p2p=0.5) == 1.5 + 2 * 6 + 2.5


def test_micro_batches_of_their_own_sizes() -> None:
    """One after the other on a single stage; on two, the small one hides behind the large one."""
    assert pipeline_time([1.0], [2.0], [1.0, 3.0]) == 12
    assert pipeline_time([1.0, 1.0], [1.0, 1.0], [2.0, 1.0]) == 2 + (2 + 2) + (1 + 1) + 1


@pytest.mark.parametrize("virtual", [1, 2])
def test_many_micro_batches_are_extrapolated_exactly(virtual: int) -> None:
    """With unequal stages and messages, 4 x 24 micro-batches replayed one by one take as long."""
    forward, backward = [1.0, 1.3, 1.0, 2.0] * virtual, [2.0, 2.0, 2.2, 4.1] * virtual
    whole = pipeline_time(forward, backward, [1.0] * 96, virtual, 0.05)
    assert pipeline_time(forward, backward, 96, virtual, 0.05) == pytest.approx(whole, rel=1e-9)


# One update


def test_matrix_products_by_hand() -> None:
    """2 FLOPs a weight and token forward, 4 backward: 4 of 8 layers, 4 micro-batches, halved over two ranks."""
    model = CostModel(SMALL, round_hardware())
    weights = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 256
    stage = model.step(layout(tensor=2, pipeline=2, sequence=True), equal_batch(128, 4, 1, 1)).stages[0]
    assert stage["gemm"] == pytest.approx(4 * 6 * 128 * 4 * weights / 2 / 1e12)


def test_attention_by_hand() -> None:
    """Half of the 128^2 pairs: 4 FLOPs a head's element forward, 2.5 times as many backward, at 80% of the rate."""
    stage = CostModel(SMALL, round_hardware()).step(layout(), equal_batch(128, 1, 1, 1)).stages[0]
    assert stage["attention"] == pytest.approx(8 * (1 + 2.5 / 0.8) * 4 * 64 * 128**2 / 2 / 1e12)


def test_tensor_parallel_volume_by_hand() -> None:
    """A layer's two all-reduces each way and the head's one, 2 (t - 1) / t of 128 x 64 activations of 2 bytes."""
    stage = CostModel(SMALL, round_hardware()).step(layout(tensor=4), equal_batch(128, 1, 1, 1)).stages[0]
    all_reduce = 2 * 3 / 4 * 128 * 64 * 2 / 1e9
    gather = all_reduce / 2
    assert stage["tensor"] == pytest.approx(8 * 4 * all_reduce + 2 * gather)


def test_context_parallel_volume_by_hand() -> None:
    """Keys and values of 3 other ranks forward, twice that backward; and the merges of 4 rounds' outputs."""
    stage = CostModel(SMALL, round_hardware()).step(layout(context=4), equal_batch(128, 1, 1, 1)).stages[0]
    keys, merges = 32 * 2 * 32 * 2 * 3 / 1e9, 32 * 64 * 4 * 10 / 1e11
    assert stage["context"] == pytest.approx(8 * 3 * (keys + merges))


def test_gradients_and_parameters_by_hand() -> None:
    """4 bytes of each gradient scattered and 2 of each parameter gathered, (d - 1) / d of them; 34 bytes updated."""
    stage = CostModel(SMALL, round_hardware()).step(layout(data=4), equal_batch(128, 4, 1, 4)).stages[0]
    assert stage["data"] == pytest.approx(parameters(SMALL) * 6 * 3 / 4 / 1e9)
    assert stage["optimizer"] == pytest.approx(parameters(SMALL) * 34 / 4 / 1e11)


def test_rings_share_the_cards_of_their_node() -> None:
    """16 replicas over two nodes move with all 8 cards; with tensor parallelism 4, four rings share them."""
    model = CostModel(SMALL, round_hardware())
    alone = model.step(layout(data=16), equal_batch(128, 16, 1, 16)).stages[0]["data"]
    shared = model.step(layout(tensor=4, data=16), equal_batch(128, 16, 1, 16)).stages[0]["data"]
    assert alone == pytest.approx(parameters(SMALL) * 6 * 15 / 16 / 0.8e9)
    assert shared == pytest.approx(alone)  # a quarter of the bytes, on a quarter of the cards


def test_messages_by_hand() -> None:
    """Activations of a micro-batch, over the tensor-parallel ranks where sequences are split."""
    model = CostModel(SMALL, round_hardware())
    batch = equal_batch(128, 8, 1, 1)
    assert model.p2p(layout(pipeline=4), batch) == pytest.approx(128 * 64 * 2 / 1e9)
    assert model.p2p(layout(tensor=2, pipeline=4, sequence=True), batch) == pytest.approx(128 * 64 / 1e9)
    assert model.p2p(layout(pipeline=4, data=4), batch) == pytest.approx(128 * 64 * 2 / 1e8)


def test_recomputation_is_one_more_forward_pass() -> None:
    """A third more products in the layers; the head is as it was."""
    model, batch = CostModel(SMALL, round_hardware()), equal_batch(128, 1, 1, 1)
    plain, full = (model.step(layout(recompute=mode), batch).stages[0] for mode in ("none", "full"))
    assert full["gemm"] == pytest.approx(plain["gemm"] * 4 / 3)
    assert full["head"] == plain["head"]


@pytest.mark.parametrize("virtual", [1, 2])
def test_parts_of_every_stage_add_up(virtual: int) -> None:
    """To the time of the update; nothing is negative."""
    cost = CostModel(SMALL, find_hardware("H100-80")).step(
        layout(tensor=2, pipeline=2, virtual_pipeline=virtual, context=2, data=2, sequence=True),
        equal_batch(128, 16, 1, 2),
    )
    for stage in cost.stages:
        assert sum(stage.values()) == pytest.approx(cost.seconds)
        assert set(stage) == {*PASS_PARTS, "p2p", "data", "optimizer", "bubble"}
        assert min(stage.values()) >= 0


def test_bubble_of_equal_stages() -> None:
    """(p - 1) / (m + p - 1), where a head without vocabulary leaves all stages equal."""
    shape = dataclasses.replace(SMALL, vocab_size=0)
    cost = CostModel(shape, round_hardware()).step(layout(pipeline=4), equal_batch(128, 8, 1, 1))
    messages = cost.stages[0]["p2p"]
    assert messages > 0
    calm = dataclasses.replace(round_hardware(), gpu=dataclasses.replace(round_hardware().gpu, link=1e30))
    cost = CostModel(shape, calm).step(layout(pipeline=4), equal_batch(128, 8, 1, 1))
    assert cost.bubble_fraction == pytest.approx(3 / 11, rel=1e-6)


def test_mfu_counts_the_models_flops() -> None:
    """Tokens/s, FLOP/s and MFU of an update are one number in three units."""
    cost = CostModel(find_model("llama3-8b"), find_hardware("H100-80")).step(
        layout(8192, data=8), equal_batch(8192, 64, 1, 8)
    )
    assert cost.tokens_per_second_per_gpu == pytest.approx(64 * 8192 / cost.seconds / 8)
    assert cost.mfu == pytest.approx(
        model_flops(PUBLISHED["llama3-8b"], 64 * 8192, 64 * 8192**2) / cost.seconds / 8 / 989e12
    )
    assert 0.4 < cost.mfu < 0.7


# Batches


def test_packed_like_the_trainer() -> None:
    """Sequences of 60 to 128 tokens in micro-batches of 128 are balanced over two replicas; sizes average 1."""
    sequences = Sequences((128, 128, 60, 60, 60, 60), 0.5)
    batch = packed_batch(sequences, layout(128, data=2), attention_tokens=1e9)
    assert len(batch.sizes) == 2
    assert batch.tokens == 124
    assert sum(batch.sizes) == pytest.approx(2)
    assert batch.head_tokens == 62
    assert batch.all_tokens == 496


def test_estimated_batch_is_close() -> None:
    """Full micro-batches of the mean: within one of the packer's, with the same tokens in all."""
    sequences = Sequences(tuple(range(40, 120)))
    where = layout(512, data=2)
    rough, packed = estimated_batch(sequences, where), packed_batch(sequences, where, 1e9)
    assert abs(len(rough.sizes) - len(packed.sizes)) <= 1
    assert rough.tokens * len(rough.sizes) == pytest.approx(packed.tokens * len(packed.sizes), rel=0.01)


def test_batches_that_do_not_divide_are_refused() -> None:
    """With the arithmetic."""
    with pytest.raises(ValueError, match=r"10 sequences over 4 replicas x micro-batches of 2 = 1.25.*multiple of 8"):
        equal_batch(128, 10, 2, 4)


def test_shapes_without_a_name_are_refused() -> None:
    """The nearest names are told."""
    with pytest.raises(ValueError, match=r"'Qwen/Qwen2.5-33B' is neither a directory .*qwen2.5-32b"):
        find_model("Qwen/Qwen2.5-33B")
    assert find_model("Qwen/Qwen2.5-32B") == PUBLISHED["qwen2.5-32b"]
    assert find_model("meta-llama/Llama-3.1-8B-Instruct") == PUBLISHED["llama3-8b"]
    assert make_shape(1, 64, 128, 4).num_kv_heads == 4
