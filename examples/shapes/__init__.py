"""A drawn world, and the recipe that makes the model in weights/demo from it."""
