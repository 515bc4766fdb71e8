"""What predictors learn from a model's own text."""
