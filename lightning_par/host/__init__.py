"""The Lightning side: the strategy, the launcher that starts its ranks, and what moves batches and metrics between them."""
