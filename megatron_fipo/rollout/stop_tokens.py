"""Where a response ends."""

from megatron_fipo.model.stop_tokens import stop_token_ids, without_stop_token

__all__ = ["stop_token_ids", "without_stop_token"]
