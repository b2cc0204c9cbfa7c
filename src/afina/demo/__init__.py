"""The main job from end to end, on words of our own."""
