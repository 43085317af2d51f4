"""What a student has of its teacher, measured exactly on held-out text."""
