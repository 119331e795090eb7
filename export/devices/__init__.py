"""Formats for devices: what other projects' converters make of our Hugging Face folders, checked in their runtimes."""
