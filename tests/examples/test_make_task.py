import json
import random
import re
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_fipo.data import load_prompts

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "make_task.py"
TINY = ["--steps", "3", "--train-problems", "20", "--validation-problems", "4"]


def load_script():
    spec = util.spec_from_file_location("make_task", SCRIPT)
    module = util.module_from_spec(spec)
    sys.modules["make_task"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_task = load_script()


def run(out, *arguments):
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_task.py", "--out", str(out), *TINY, *arguments])
        make_task.main()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command's output with tiny settings."""
    out = tmp_path_factory.mktemp("quickstart") / "base"
    run(out)
    return out


def test_prompt_tokens_are_bos_and_characters(made):
    """The saved tokenizer's chat template gives <bos> and one token a character; decoding restores the text."""
    tokenizer = AutoTokenizer.from_pretrained(made)
    chat = [{"role": "user", "content": "12+7+30?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *(tokenizer.convert_tokens_to_ids(c) for c in "12+7+30?")]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12+7+30?"
    assert len({tokenizer.convert_tokens_to_ids(c) for c in "0123456789+-*%=;:,.? Answer"}) == 27


def test_checkpoint_loads(made):
    """The checkpoint is float32 safetensors of the documented shape, and generation ends at <eos>."""
    model = AutoModelForCausalLM.from_pretrained(made)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(made)
    assert (made / "model.safetensors").is_file()
    assert model.dtype == torch.float32
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 128, 256)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (4, 2, 30)
    assert not config.tie_word_embeddings
    generation = GenerationConfig.from_pretrained(made)
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_problems_are_right_and_disjoint(made):
    """Every ground truth is its sum; training and validation problems differ, by the hash of their text."""
    tokenizer = AutoTokenizer.from_pretrained(made)
    for name, count, held in (("train", 20, False), ("validation", 4, True)):
        prompts = load_prompts(made / f"{name}.parquet", tokenizer, max_prompt_tokens=32)
        assert (prompts.num_rows, len(prompts)) == (count, count)
        for prompt in prompts:
            (message,) = prompt.messages
            assert sum(map(int, message["content"][:-1].split("+"))) == int(prompt.ground_truth)
            assert make_task.held_out(message["content"]) is held


def test_complete_output_is_kept(made, capsys):
    """The same arguments again do nothing; other ones make it anew, and a seed gives the same bytes every time."""
    marker = (made / "task.json").stat().st_mtime_ns
    run(made)
    assert "is complete" in capsys.readouterr().out
    assert (made / "task.json").stat().st_mtime_ns == marker
    again = made.with_name("again")
    run(again, "--seed", "1")
    assert json.loads((again / "task.json").read_text())["arguments"]["seed"] == 1
    run(again)
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert (again / "train.parquet").read_bytes() == (made / "train.parquet").read_bytes()
    assert sorted(p.name for p in made.parent.iterdir()) == ["again", "base"]


def test_foreign_directory_is_left_alone(tmp_path):
    """A directory that this script did not make is refused and stays as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="was not created by this script"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_clean_corpus_is_right():
    """Without slips every step and every answer is true, in all three formats."""
    rng = random.Random(0)
    for _ in range(300):
        numbers = make_task.sample_problem(rng, held=False)
        response = make_task.response_to(numbers, rng, make_task.CLEAN)
        assert response.endswith(f"Answer:{sum(numbers)}")
        for left, right in re.findall(r"(\d+\+\d+)=(\d+)", response):
            assert sum(map(int, left.split("+"))) == int(right)


def test_sloppy_corpus_slips_more_in_short_formats():
    """The corpus the base model ends on prefers nothing: long responses are right more often than short ones."""
    rng = random.Random(0)
    right = {True: [], False: []}
    for _ in range(2000):
        numbers = make_task.sample_problem(rng, held=False)
        response = make_task.response_to(numbers, rng, make_task.SLOPPY)
        right[":" in response.removesuffix(response[response.index("Answer") :])].append(
            response.endswith(f"Answer:{sum(numbers)}")
        )
    long, short = (sum(r) / len(r) for r in (right[True], right[False]))
    assert 0.7 < long < 0.85
    assert 0.5 < short < 0.7
