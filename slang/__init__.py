"""What the scripts at the top level share; docs/house.md says what is where."""
