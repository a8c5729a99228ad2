from tests.models import _one_thread, make_model, tokenizer_dir

__all__ = ["_one_thread", "make_model", "tokenizer_dir"]
