"""What `llmdistill generate` does: a teacher turns seed tasks into an instruction dataset."""
