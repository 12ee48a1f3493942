"""The second job: a teacher turns seed tasks into a clean instruction data set."""
