"""What checks the shapes and types that signatures promise, in every test (pytest's --jaxtyping-packages)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484
