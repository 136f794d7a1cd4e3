"""The application that learns: thumbs in, policy versions out."""
