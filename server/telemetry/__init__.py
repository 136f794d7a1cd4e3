"""Traces in OpenTelemetry's form. Only this package imports OpenTelemetry, and only where traces are wanted."""
