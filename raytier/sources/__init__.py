"""Where models come from: the registry of models, and the loaders that bring their files to this machine."""
