"""Claims about learning, each a command: ablations, controls, sweeps."""
