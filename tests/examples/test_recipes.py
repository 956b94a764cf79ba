"""The recipes: their numbers, that models and layouts fit, and that README shows what memory.py prints."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.algorithm import loss_config
from megatron_fipo.config import Config, load_config
from megatron_fipo.model.check import check_model
from megatron_fipo.scaling.cost.hardware import find_hardware
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.memory import rollout_memory, training_memory
from megatron_fipo.scaling.planner.memory_check import recipe_problems
from megatron_fipo.scaling.planner.run_inputs import planner_of

ROOT = Path(__file__).parents[2]
SCRIPTS = {  # recipe -> the batch script that takes it
    "fipo_32b": "fipo_32b",
    "dapo_32b": "dapo_32b",
    "dapo_32b_mini_batch_64": "dapo_32b",
    "fipo_7b": "fipo_7b",
    "dapo_7b": "fipo_7b",
    "fipo_30b_a3b": "fipo_30b_a3b",
}
RECIPES = tuple(SCRIPTS)
UPDATES = {  # a step
    "fipo_32b": 8,
    "dapo_32b": 16,
    "dapo_32b_mini_batch_64": 8,
    "fipo_7b": 8,
    "dapo_7b": 16,
    "fipo_30b_a3b": 8,
}
# config.json as published, without what nothing here reads
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
CONFIG_JSON = {
    "Qwen2.5-32B": QWEN
    | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40}
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 131072, "max_window_layers": 64}
    | {"rope_theta": 1000000.0, "rms_norm_eps": 1e-05},
    "Qwen2.5-Math-7B": QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "max_position_embeddings": 4096, "sliding_window": 4096, "max_window_layers": 28}
    | {"rope_theta": 10000, "rms_norm_eps": 1e-06},
    "Qwen3-30B-A3B-Base": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "attention_bias": False,
        "vocab_size": 151936,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
    | {"num_experts_per_tok": 8, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06},
}
PAPER: dict[str, dict[str, dict[str, Any]]] = {
    "fipo_32b": {
        "rollout": {"prompts_per_step": 512, "group_size": 16, "prompts_per_round": 4 * 512, "max_rounds": 10}
        | {"temperature": 1.0, "top_p": 1.0, "max_response_tokens": 20480, "dynamic_sampling": True},
        "algorithm": {"loss": "fipo", "half_life": 32, "influence_clip": (1.0, 1.2), "safety_threshold": 10}
        | {
            "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.28,
            "dual_clip": 10,
            "kl_coefficient": 0,
            "entropy_coefficient": 0,
        },
        "optimizer": {"lr": 1e-6, "warmup": 10, "warmup_unit": "step", "betas": (0.9, 0.999), "eps": 1e-8}
        | {"weight_decay": 0.1, "grad_clip": 1.0},
        "trainer": {
            "mini_batch_prompts": 64,
            "mini_batch_order": "mixed",
            "epochs_per_batch": 1,
            "max_steps": 600,
        },
        "data": {"max_prompt_tokens": 2048},
        "reward": {"function": "dapo", "overlong_buffer_tokens": 4096, "overlong_penalty_factor": 1.0},
        "eval": {"every": 5, "samples": 32, "temperature": 1.0, "top_p": 0.7},
        "checkpoint": {"every": 5},
        "parallel": {"world_size": 16 * 8},
    },
    "dapo_32b": {
        "rollout": {"prompts_per_step": 512, "group_size": 16, "prompts_per_round": 3 * 512, "max_rounds": 10},
        "algorithm": {"loss": "grpo", "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "dual_clip": 10},
        "trainer": {"mini_batch_prompts": 32, "mini_batch_order": "mixed", "max_steps": 600},
    },
    "dapo_32b_mini_batch_64": {
        "rollout": {"prompts_per_step": 512, "group_size": 16},
        "algorithm": {"loss": "grpo", "dual_clip": 10, "max_dual_clipped_tokens": 1},
        "trainer": {"mini_batch_prompts": 64, "mini_batch_order": "mixed"},
    },
    "fipo_7b": {
        "rollout": {"prompts_per_step": 512, "group_size": 32, "prompts_per_round": 4 * 512}
        | {"max_response_tokens": 10240},
        "algorithm": {"half_life": 32, "influence_clip": (0.8, 1.2), "safety_threshold": 3, "dual_clip": 10},
        "trainer": {"mini_batch_prompts": 64, "mini_batch_order": "mixed"},
        "data": {"max_prompt_tokens": 2048},
        "reward": {"overlong_buffer_tokens": 2048},
        "model": {"overrides": {"max_position_embeddings": 32768}},
    },
    "dapo_7b": {
        "rollout": {"prompts_per_step": 512, "group_size": 16, "max_response_tokens": 8192},
        "algorithm": {"loss": "grpo", "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "dual_clip": 10},
        "trainer": {"mini_batch_prompts": 32},
        "reward": {"overlong_buffer_tokens": 4096},
    },
}


def load_script(name):
    spec = util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


memory = load_script("memory")


def recipe(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "examples" / f"{name}.yaml", overrides)


@pytest.fixture
def models(tmp_path):
    """A directory with the published config.json of each model."""
    for name, config in CONFIG_JSON.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", PAPER)
def test_numbers_are_the_papers(name):
    """Every number that the paper, or the authors' code, gives."""
    config = recipe(name)
    for section, values in PAPER[name].items():
        found = {key: getattr(getattr(config, section), key) for key in values}
        assert found == values


@pytest.mark.parametrize("name", RECIPES)
def test_model_fits_the_layout(models, name):
    """Heads, layers and lengths, with the model's own config.json; the loss's constants are legal."""
    config = recipe(name)
    config = recipe(name, f"model.hf_path={models / Path(config.model.hf_path).name}")
    arch = check_model(config)
    assert arch == dataclasses.replace(
        memory.shape(recipe(name)),  # what memory.py knows without the model
        max_position_embeddings=arch.max_position_embeddings,
        rope_theta=arch.rope_theta,
        norm_eps=arch.norm_eps,
    )
    loss_config(config.algorithm, config.rollout)
    assert config.updates_per_step == UPDATES[name]


@pytest.mark.parametrize(
    ("name", "gpus"), [*((name, recipe(name).parallel.world_size) for name in RECIPES), ("fipo_30b_a3b", 64)]
)
def test_recipe_fits_into_80_gb(name, gpus):
    """An update leaves 10 GB for what the arithmetic does not know, the engine beside the trainer 7; the planner, with
    the reserve that it adds, has nothing to say."""
    config = recipe(name, f"parallel.world_size={gpus}")
    arch, stages = memory.shape(config), range(config.parallel.pipeline)
    assert max(training_memory(arch, config, stage).total for stage in stages) < 70e9
    engine = config.rollout.server.gpu_memory_utilization * 80e9
    assert max(rollout_memory(arch, config, stage).kept for stage in stages) + engine < 73e9
    assert recipe_problems(config, find_hardware("H100-80")) == []


def _plan(*overrides):
    """Return what `scaling plan` says of the recipe's layout for the mixture of experts."""
    config = recipe("fipo_30b_a3b", *overrides)
    return planner_of(config, find_hardware("H100-80")).evaluate(Layout.of(config))


def _spare(*overrides):
    return _plan(*overrides).spare / 1e9


def test_readme_says_what_the_planner_says():
    """The time of an update and the memory that is left on 4 and on 8 nodes, and what other layouts would need."""
    text = " ".join((ROOT / "examples" / "README.md").read_text().split())
    on_8_nodes = "parallel.world_size=64"
    four, eight = _plan(), _plan(on_8_nodes)
    assert f"{four.cost.seconds:.1f} s an update and {four.spare / 1e9:.1f} GB to spare on 4 nodes" in text
    assert f"{eight.cost.seconds:.1f} s and {eight.spare / 1e9:.1f} GB on 8" in text
    without = "model.recompute=none"
    needed = find_hardware("H100-80").gpu.memory / 1e9 - _spare(without)
    assert f"Without recomputation TP 2 would need {needed - 2:.0f} GB" in text  # 2 GB: the engine that sleeps
    assert _spare(without, "parallel.tensor=4") < 0
    assert f"on 8 nodes alone, with {_spare(without, 'parallel.tensor=4', on_8_nodes):.0f} GB to spare" in text
    assert _spare(without, "parallel.tensor=8") > 0


def test_experts_have_fipos_recipe_but_the_model():
    """The mixture of experts is trained as the paper trains 32B: only model, layout, servers and experts differ."""
    ours, papers = (dataclasses.asdict(recipe(name)) for name in ("fipo_30b_a3b", "fipo_32b"))
    different = {f"{s}.{key}" for s, section in ours.items() for key in section if section[key] != papers[s][key]}
    assert {d for d in different if not d.startswith("parallel.")} == {
        *("run.name", "model.hf_path", "model.recompute", "moe.routing_replay", "rollout.server")
    }
    assert {d for d in different if d.startswith("parallel.")} == {
        *("parallel.world_size", "parallel.tensor", "parallel.expert", "parallel.pipeline"),
        *("parallel.first_stage_layers", "parallel.last_stage_layers"),
    }


OWN_SIZES = {"trainer.mini_batch_prompts", "rollout.prompts_per_round", "algorithm.max_dual_clipped_tokens"}


@pytest.mark.parametrize(
    ("fipo", "dapo", "sizes"),
    [
        ("fipo_32b", "dapo_32b", OWN_SIZES),
        ("fipo_32b", "dapo_32b_mini_batch_64", set()),
        (
            *("fipo_7b", "dapo_7b"),
            OWN_SIZES
            | {"rollout.group_size", "rollout.max_response_tokens", "reward.overlong_buffer_tokens"}
            | {"trainer.tokens_per_micro_batch"},
        ),
    ],
)
def test_dapo_is_fipos_recipe_but_the_loss(fipo, dapo, sizes):
    """Each baseline differs from FIPO in the loss, and the paper's in sizes that are DAPO's own."""
    ours, theirs = (dataclasses.asdict(recipe(name)) for name in (fipo, dapo))
    different = {f"{s}.{key}" for s, section in ours.items() for key in section if section[key] != theirs[s][key]}
    future_kl = {"algorithm.influence_clip", "algorithm.safety_threshold"}  # without meaning for loss=grpo
    assert different - future_kl == {"run.name", "algorithm.loss"} | sizes


@pytest.mark.parametrize("name", RECIPES)
def test_batch_script_asks_for_the_recipes_gpus(name):
    """Nodes x tasks a node are parallel.world_size; the script's default is the recipe, or the recipe names it."""
    script = (ROOT / "slurm" / f"{SCRIPTS[name]}.sh").read_text()
    nodes, tasks = (int(re.search(rf"#SBATCH --{key}=(\d+)", script)[1]) for key in ("nodes", "ntasks-per-node"))
    assert nodes * tasks == recipe(name).parallel.world_size
    line = f"#   sbatch --job-name={recipe(name).run.name} slurm/{SCRIPTS[name]}.sh examples/{name}.yaml"
    own = f"--recipe examples/{name}.yaml" in script
    assert own or line in (ROOT / "examples" / f"{name}.yaml").read_text().splitlines()


def test_readme_shows_what_memory_prints(monkeypatch, capsys):
    """Each table in README is the output of the command above it."""
    readme = (ROOT / "examples" / "README.md").read_text()
    blocks = readme.split("<!-- python examples/memory.py ")[1:]
    assert len(blocks) == 3
    monkeypatch.chdir(ROOT)
    for block in blocks:
        command, text = block.split(" -->\n", 1)
        monkeypatch.setattr(sys, "argv", ["memory.py", *shlex.split(command)])
        memory.main()
        assert text.startswith(capsys.readouterr().out)
