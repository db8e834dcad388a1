"""What lies on disk: atomic files, safetensors, JSON of dataclasses, saved networks, the log of epochs."""
