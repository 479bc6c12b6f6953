"""The public class, and one run from images to a pruned model."""
