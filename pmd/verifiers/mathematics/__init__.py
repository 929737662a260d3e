"""Reads mathematical answers as people and models write them, and decides by exact arithmetic whether two are equal."""
