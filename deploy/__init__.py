"""What operators run beside the server and the trainer: Prometheus, its rules, a Grafana dashboard."""
