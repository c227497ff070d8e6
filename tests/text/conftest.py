from tests.tiny_speech_lm import text_tokenizer

__all__ = ["text_tokenizer"]
