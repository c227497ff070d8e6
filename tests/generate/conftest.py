from tests.tiny_speech_lm import params, text_tokenizer

__all__ = ["params", "text_tokenizer"]
