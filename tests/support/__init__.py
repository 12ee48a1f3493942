"""Helpers that test modules share. Tests import them from here, never from each other."""
