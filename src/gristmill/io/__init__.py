"""Reading and writing models: files, tokenizers, chat templates, checkpoint directories, the cache."""
