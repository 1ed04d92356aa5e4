"""The tray companion of llmq; `python3 -m tray` runs it."""
