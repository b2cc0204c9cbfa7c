"""Configurations of other trainers as settings of `afina train`; nothing of theirs is run."""
