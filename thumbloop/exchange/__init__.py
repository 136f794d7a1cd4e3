"""Data in the shapes that other tools read and write: out of the store into files, and out of files onto the wire."""
