"""The tests of llmq; `python3 -m tests` runs them all."""
