"""What is wrong with a request, field by field."""

from thumbloop.errors import FieldViolation, InvalidRequest


class Violations:
    """Collects what is wrong, so that a caller hears all of it at once."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def expect(self, holds: bool, field: str, description: str) -> None:
        """Note a field of which something does not hold."""
        if not holds:
            self._found.append(FieldViolation(field, description))

    def no_longer(self, text: str, most: int, field: str) -> None:
        """Note a text of more characters than that."""
        self.expect(len(text) <= most, field, f"has {len(text)} characters, at most {most} allowed")

    def storable(self, text: str, most: int, field: str) -> None:
        """Note a text of more characters than that, or that no column of PostgreSQL takes."""
        self.no_longer(text, most, field)
        self.expect("\0" not in text, field, "holds a NUL character")

    def raise_if_any(self) -> None:
        """Raise InvalidRequest with all that was noted."""
        if self._found:
            raise InvalidRequest(*self._found)
