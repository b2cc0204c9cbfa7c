"""From settings to a run that has not begun."""
