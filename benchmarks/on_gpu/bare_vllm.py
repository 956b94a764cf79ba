"""Tokens/s of vLLM's offline interface; runs in vLLM's environment, with a JSON task from standard input."""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    """Generate, and print the tokens per second."""
    task = json.load(sys.stdin)
    model = LLM(
        model=task["model"],
        dtype=task["dtype"],
        load_format="dummy",
        skip_tokenizer_init=True,
        gpu_memory_utilization=task["share"],
        max_model_len=len(task["prompts"][0]) + task["response"],
        max_num_seqs=256,
    )
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    sampling = SamplingParams(
        temperature=1.0, max_tokens=task["response"], ignore_eos=True, detokenize=False, logprobs=0
    )
    model.generate(prompts[:8], sampling, use_tqdm=False)
    started = time.perf_counter()
    outputs = model.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(json.dumps({"tokens_per_second": tokens / seconds}))


if __name__ == "__main__":
    main()
