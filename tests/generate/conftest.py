from tests.explicit_ranks import explicit_ranks
from tests.tiny_speech_lm import params, text_tokenizer

__all__ = ["explicit_ranks", "params", "text_tokenizer"]
