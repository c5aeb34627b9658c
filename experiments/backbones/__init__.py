"""How the packaged backbones, their corpora and samples were made."""
