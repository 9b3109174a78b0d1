"""Parameters on disk: the native format, compressed-tensors, and the Hugging Face directories they come from.

One file per format. Whatever is read is untrusted: every damaged or hostile file is one clear error that names it.
Whatever is written appears whole or not at all.
"""
