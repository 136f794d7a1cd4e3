"""The whole loop in one command: base model, simulated users, report."""
