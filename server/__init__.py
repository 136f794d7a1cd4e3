"""The application that answers: python -m server."""
