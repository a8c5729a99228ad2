from tests.checkpoint.conftest import _one_thread, make_model, tokenizer_dir

__all__ = ["_one_thread", "make_model", "tokenizer_dir"]
