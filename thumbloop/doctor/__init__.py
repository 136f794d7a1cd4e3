"""Looks an installation over and says what to mend. It reads; it never writes, creates or migrates anything."""
