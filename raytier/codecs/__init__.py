"""How the bytes of a parameter change on their way: forms to compute on, codecs of files, checksums. No torch."""
