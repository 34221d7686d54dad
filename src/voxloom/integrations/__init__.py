"""Models and objects of other projects. Each is imported where it is used."""
