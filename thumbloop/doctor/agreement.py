"""Whether server and trainer mean the same model, state and question."""

from thumbloop.doctor.findings import Finding, Subject, ok, wrong


def agreement(subject: Subject) -> Finding:
    """Compare the settings that both need alike."""
    if subject.trainer is None:
        return ok("agreement", "no settings of a trainer were given")
    sections = ("model", "state", "verdict")
    other = [s for s in sections if getattr(subject.server, s) != getattr(subject.trainer, s)]
    if other:
        return wrong(
            "agreement",
            f"server and trainer differ in {', '.join(other)}",
            "the same values in both files",
        )
    return ok("agreement", "server and trainer have the same model, state and verdict")
