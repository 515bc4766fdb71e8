"""Training of predictors on a model's own text."""
