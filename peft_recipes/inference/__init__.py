"""A saved adapter in use: asked, chatted with, its predictions; beside its base, in the terminal or on a page."""
