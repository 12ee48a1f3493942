"""What test modules share; tests import it from here, never from each other."""
