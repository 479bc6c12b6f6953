"""What is said of a pruned model."""
