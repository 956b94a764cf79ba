"""Small files in the DAPO schema, and the tokenizer that the tests of this room read them with."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def row(content: str, truth: str = "1", index: int = 0) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": content}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": str(index)},
    }


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_as_dapo_math(problems: list[tuple[str, str]], repeats: int, path: Path) -> Path:
    """(content, ground truth) in the types of the published DAPO-Math-17k: all rows repeated, in one row group."""
    schema = pa.schema(
        {
            "data_source": pa.string(),
            "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
            "ability": pa.string(),
            "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
            "extra_info": pa.struct({"index": pa.string()}),
        }
    )
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": content, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{number:08x}-d1d5-4d7b-a5d0-9a1b2c3d4e5f"},
        }
        for number, (content, truth) in enumerate(problems)
    ]
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table.take(list(range(len(rows))) * repeats), path, row_group_size=len(rows) * repeats)
    return path


def write_as_aime_2024(problems: list[tuple[str, str]], repeats: int, path: Path) -> Path:
    """(content, ground truth) in the types of the published AIME 2024: another index, and a field of nothing."""
    schema = pa.schema(
        {
            "data_source": pa.string(),
            "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
            "ability": pa.string(),
            "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
            "extra_info": pa.struct({"index": pa.int64(), "raw_problem": pa.string(), "split": pa.null()}),
        }
    )
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": content, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": number, "raw_problem": content, "split": None},
        }
        for number, (content, truth) in enumerate(problems)
        for _ in range(repeats)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def character_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Token ids are ASCII codes."""
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)
