"""Editors: methods that turn a request into an :class:`~driftlens.edits.Edit`."""
