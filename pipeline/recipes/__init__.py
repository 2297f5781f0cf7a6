"""One file a method. A recipe knows models, losses and the description of views; nothing of engines, files or trackers."""
