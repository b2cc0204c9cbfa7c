"""Adapters on the Hugging Face Hub: publish one, download one."""
