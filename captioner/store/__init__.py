"""The captions table: plan, commit, resume, publish, verify, read."""
