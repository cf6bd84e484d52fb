"""What a run will need, told from its configuration before anything is taken. Nothing heavy is loaded."""
