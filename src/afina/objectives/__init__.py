"""What is minimised: one file a family of losses."""
