"""Kernel launches and memory traffic of the LM head and the loss of one micro-batch: plain torch and compiled.

    python benchmarks/head_traffic.py [--tokens 16384] [--vocab 151936] [--hidden 1536] [--chunk-tokens 4096]
        [--terabytes-per-second 3.35]

Counted instead of timed, so no GPU is needed: a dispatch mode records every torch operation of a small case with
the bytes it reads and writes, scaled to the requested size, in bfloat16. Views and empty tensors launch
nothing. The compiled kernels read each logit once; forward and backward are one launch per chunk. Matmuls are
excluded: both variants have the same four.
The last column is the time of the traffic at the given memory bandwidth (3.35 TB/s: data sheet of an H100 SXM).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss
from megatron_fipo.ops import logits as logit_ops
from megatron_fipo.ops.logits import RowTerms, empty_logits, logit_gradient, logit_statistics

WRITE_ONLY = ("copy_", "zero_", "fill_")
NO_KERNEL = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "alias",
)
ROWS, COLUMNS, TOKENS = 16, 4096, 4096  # sizes of the small cases


@dataclass
class Traffic:
    """Kernel launches, and bytes they read and write."""

    launches: float = 0
    bytes: float = 0

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.launches * times, self.bytes * times)


class Counter(TorchDispatchMode):
    """Dispatch mode that sums the traffic of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        name = func.overloadpacket.__name__
        if func.is_view or name in NO_KERNEL:
            return result
        written = _tensors(given.pop("out", None)) or _tensors(result)
        read = _tensors((args[1:] if name in WRITE_ONLY else args, given))
        self.traffic.launches += 1
        self.traffic.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*written, *read))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def count(call: Callable[[], Any]) -> Traffic:
    """Return the traffic of the torch operations of a call."""
    with Counter() as counter:
        call()
    return counter.traffic


@contextmanager
def plain_torch() -> Iterator[None]:
    """Make one element-wise block hold all rows of the small case, in plain torch."""
    with (
        mock.patch.object(logit_ops, "serves", return_value=False),
        mock.patch.object(logit_ops, "_BLOCK_BYTES_CPU", 4 * ROWS * COLUMNS),
    ):
        yield


def head_passes() -> tuple[Traffic, Traffic]:
    """Return the traffic of one block in plain torch, forward and backward; [ROWS, COLUMNS] bfloat16."""
    logits = empty_logits(ROWS, COLUMNS, torch.bfloat16, torch.device("cpu")).normal_()
    targets, out = torch.arange(ROWS), torch.empty(4, ROWS)
    terms = RowTerms(*torch.ones(4, ROWS))._replace(slope=None)  # no entropy bonus, as in the recipes
    with plain_torch():
        forward = count(lambda: logit_statistics(logits, targets, 1.0, out))
        backward = count(lambda: logit_gradient(logits, targets, terms, 1.0, logits))
    return forward, backward


def loss_in_torch() -> Traffic:
    """Return the traffic of the FIPO loss of TOKENS tokens, forward and backward, in plain torch."""
    log_probs = torch.randn(TOKENS).requires_grad_()
    batch = (torch.randn(TOKENS), torch.randn(1), torch.ones(TOKENS).bool(), torch.tensor([0, TOKENS]))
    return count(lambda: fipo_loss(log_probs, *batch, FIPOLossConfig(), backend="reference").loss_sum.backward())


def rows_of_table(args: argparse.Namespace) -> list[tuple[str, Traffic, Traffic]]:
    """Return (what, plain torch, compiled) for the requested size."""
    logits, chunks = args.tokens * args.vocab, -(-args.tokens // args.chunk_tokens)
    blocks = -(-args.tokens // ((64 << 20) // (4 * args.vocab)))  # in plain torch on a GPU, of 64 MiB

    def torch_passes(one_block: Traffic) -> Traffic:
        return Traffic(one_block.launches * blocks, one_block.bytes / (ROWS * COLUMNS) * logits)

    forward, backward = (torch_passes(one_block) for one_block in head_passes())
    weight = args.vocab * args.hidden
    loss = loss_in_torch()
    return [
        ("head, statistics of logits", forward, Traffic(chunks, logits * 2)),
        ("head, gradient of logits", backward, Traffic(chunks, logits * (2 + 2))),
        # In plain torch: the product is written, added to a float32 sum, cast, and added to Megatron's buffer.
        (
            "head, sum of the weight's gradient",
            Traffic(chunks * -(-args.vocab // 16384) * 2 + 2, weight * ((2 + 2 + 8) * chunks + 6 + 10)),
            Traffic(0, weight * 8 * chunks),  # in the matmul's epilogue
        ),
        (
            "FIPO loss and its gradient",
            Traffic(loss.launches, loss.bytes / TOKENS * args.tokens),
            Traffic(1, args.tokens * (4 + 4 + 1 + 4)),  # log-probabilities old and new, mask, gradient
        ),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="response tokens of the micro-batch")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--chunk-tokens", type=int, default=4096, help="model.lm_head_chunk_tokens")
    parser.add_argument("--terabytes-per-second", type=float, default=3.35)
    args = parser.parse_args()
    rows = rows_of_table(args)
    table = Table(title=f"{args.tokens:,} tokens, {args.vocab:,} x {args.hidden}, chunks of {args.chunk_tokens:,}")
    for column in ("what", "torch: launches", "GB", "ms", "compiled: launches", "GB", "ms"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, *sides in rows:
        cells = [
            cell
            for side in sides
            for cell in (
                f"{side.launches:,.0f}",
                f"{side.bytes / 1e9:.3g}",
                f"{side.bytes / args.terabytes_per_second / 1e9:.2g}",
            )
        ]
        table.add_row(what, *cells)
    Console(width=110).print(table)
    print(json.dumps({what: {"torch": vars(a), "compiled": vars(b)} for what, a, b in rows}))


if __name__ == "__main__":
    main()
