"""Does the model know the slang? Baseline against adapted, over the same questions."""
