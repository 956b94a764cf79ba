"""Configs from mutated YAML and overrides: a config or an error to be read, and no secret in either."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_fipo.config import Config, DataConfig, ModelConfig, load_config, to_yaml
from megatron_fipo.config.renamed import RENAMED
from megatron_fipo.config.setting import settings as settings_of
from megatron_fipo.config.setting import subsections
from tests.fuzz.inputs import HOSTILE, refusal

pytestmark = pytest.mark.slow  # two minutes for all targets

SECRET = "hf_0123456789"
BASE = to_yaml(Config(model=ModelConfig(hf_path="base"), data=DataConfig(train="train.parquet")))
LINES = BASE.splitlines()
KEYS = [*(s.name for s in settings_of(Config)), *subsections(Config), *RENAMED]
VALUES = (
    *("0", "-1", "1", "null", "true", "nan", "inf", "1e400", "[]", "{}", "[1,2", "a", "''", "9" * 400, "0x10", "1_0"),
    *(
        "${oc.env:SECRET}",
        "${oc.env:SECRET,x}",
        "${oc.decode:${oc.env:SECRET}}",
        "${run.name}",
        "${a}",
        "${",
        "!!python/x 1",
    ),
    *("[0.9,0.95]", "{a: b}", "*a", "&a b", "2026-01-01", "${oc.dict.values:run}", "${run}", "${oc.create:{a:1}}"),
    *HOSTILE,
)
overrides = st.lists(st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=3)
mutations = st.lists(st.tuples(st.integers(0, len(LINES) - 1), st.sampled_from(VALUES), st.booleans()), max_size=2)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations, overrides, st.binary(max_size=6))
@example([], ["rollout.server.placement=disaggregated", "rollout.server.tensor_parallel_size=0"], b"")
@example([], ["trainer=[]"], b"")
@example([], [f"parallel.world_size={'9' * 400}"], b"")
@example([], ["rollout.placement=local", "rollout.server=3"], b"")
@example([], ["run.name=${oc.env:SECRET}"], b"")
def test_configs(
    tmp_path: Path, changes: list[tuple[int, str, bool]], given_overrides: list[str], noise: bytes
) -> None:
    """Whatever is in them: a config that is written and read back, or a ValueError."""
    os.environ["SECRET"] = SECRET
    lines = list(LINES)
    for number, value, whole in changes:
        lines[number] = value if whole else lines[number].partition(":")[0] + f": {value}"
    file = tmp_path / "config.yaml"
    file.write_bytes("\n".join(lines).encode(errors="surrogatepass") + noise)
    found: list[Config] = []
    said = refusal(lambda: found.append(load_config(file, given_overrides)))
    del os.environ["SECRET"]
    assert SECRET not in (said or to_yaml(found[0]))
