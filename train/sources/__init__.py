"""Sources of training images, one a file; `train.data` opens the one that a recipe names."""
