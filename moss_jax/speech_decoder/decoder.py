"""Codes and a voice -> speech: a whole utterance at once, or as a stream."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.arguments import check_seed
from moss_jax.errors import MossError
from moss_jax.nn.precision import in_32_bits
from moss_jax.nn.tree import flatten, unflatten
from moss_jax.speech_decoder.config import SpeechDecoderConfig, flow_stem
from moss_jax.speech_decoder.flow import sampler
from moss_jax.speech_decoder.flow.stream import CACHE_BYTES, CachedFlow, Prompt
from moss_jax.speech_decoder.stream import CachedStream
from moss_jax.speech_decoder.vocoder.config import VocoderConfig
from moss_jax.speech_decoder.vocoder.model import HiFT, fold_weight_norm, sine_noise
from moss_jax.speech_decoder.voice import Voice

MAX_PROMPTS = 4  # prefilled voices that are kept

PromptKey = tuple[str | bytes, ...]  # the flow's name, and hashes of a voice's arrays


class SpeechDecoder:
    """Codes -> speech with loaded weights. Results do not depend on earlier calls.

    Args:
        config: sizes.
        params: nested parameters by part: "flow" for `decode`, "flow_chunk_5" and the like for `stream`, "vocoder"
            for both, with its weight norm folded or not. May be a mapping that loads a part when it is first used.
        cache_memory, cache_dtype: of the flow's streams, see `CachedFlow`.
    """

    def __init__(
        self,
        config: SpeechDecoderConfig,
        params: Mapping[str, Any],
        *,
        cache_memory: int = CACHE_BYTES,
        cache_dtype: str = "float32",
    ) -> None:
        self.config = config
        self.vocoder_config = replace(config.vocoder, weight_norm=False)
        self._params = params
        self._cache_memory = cache_memory
        self._cache_dtype = cache_dtype
        self._flows: dict[str, CachedFlow] = {}
        self._prompts: dict[PromptKey, Prompt] = {}

    @in_32_bits
    def decode(self, codes: np.ndarray, voice: Voice, seed: int = 0) -> np.ndarray:
        """Codes int [N] -> speech float32 [samples_per_code * N] at `config.sample_rate`.

        Other lengths in the same bucket compile nothing. The same seed gives the same speech.

        Raises:
            MossError: an invalid seed, no codes, codes out of range, more of them than the flow supports after the
                voice's prompt, a voice that does not fit, or missing weights.
        """
        config = self.config
        seed = check_seed(seed)
        check_voice(config, voice)
        flow = self.part(flow_stem())
        vocoder = self.vocoder_params
        mel = sampler.decode(flow, config.flow, codes, voice)
        return vocode(vocoder, self.vocoder_config, np.asarray(mel[0]), seed)

    @in_32_bits
    def stream(self, voice: Voice, seed: int = 0, chunk: int | None = None) -> CachedStream:
        """A stream that takes codes as they are generated and returns the speech that they complete.

        Args:
            chunk: codes in a chunk, see `SpeechDecoderConfig.streaming`.

        Raises:
            MossError: an invalid seed, no weights for this chunk size, or a voice that does not fit.
        """
        seed = check_seed(seed)
        check_voice(self.config, voice)
        stem, flow = self.config.streaming(chunk)
        config = replace(self.config, vocoder=self.vocoder_config)
        if stem not in self._flows:
            self._flows[stem] = CachedFlow(self.part(stem), flow, memory=self._cache_memory, dtype=self._cache_dtype)
        return CachedStream(config, self._flows[stem], self._prompt(stem, voice), self.vocoder_params, seed)

    def _prompt(self, stem: str, voice: Voice) -> Prompt:
        """The prefilled voice; the most recent ones are kept."""
        parts = [np.ascontiguousarray(leaf).tobytes() for leaf in (voice.codes, voice.mel, voice.embedding)]
        key: PromptKey = (stem, *(hashlib.sha256(part).digest() for part in parts))
        if key not in self._prompts:
            if len(self._prompts) >= MAX_PROMPTS:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[key] = self._flows[stem].prefill(voice)
        self._prompts[key] = self._prompts.pop(key)  # the most recently used one is last
        return self._prompts[key]

    def part(self, name: str) -> Any:
        """The nested parameters of one part, such as "flow". Raises MossError when there are none."""
        if name not in self._params:
            present = ", ".join(f"{part}.safetensors" for part in sorted(self._params)) or "none"
            raise MossError(f"speech decoder: {name}.safetensors is missing, there are: {present}")
        return self._params[name]

    @cached_property
    def vocoder_params(self) -> Any:
        """Nested parameters of HiFT with folded weight norm, for `vocoder_config`."""
        folded = fold_weight_norm(flatten(self.part("vocoder")))
        return unflatten({path: jnp.asarray(leaf) for path, leaf in folded.items()})


def vocode(params: Any, config: VocoderConfig, mel: np.ndarray, seed: int) -> np.ndarray:
    """Log-mel float32 [T, M] -> speech float32 [hop * T]. `params`: with folded weight norm."""
    frames = len(mel)
    rows = sampler.bucket(frames, 2 * frames + 8)
    padded = np.pad(mel, ((0, rows - frames), (0, 0)))
    wave = _vocode(config)(params, padded[None], np.array([frames], np.int32), np.array([seed], np.uint32))
    return np.asarray(wave)[0, : frames * config.hop]


@lru_cache(maxsize=4)
def _vocode(config: VocoderConfig) -> Any:
    """(params, mel [B, T, M], lengths int32 [B], seeds uint32 [B]) -> waves [B, hop * T], compiled."""

    def run(params: Any, mel: jax.Array, lengths: jax.Array, seeds: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            draw = partial(sine_noise, config, first=0, frames=mel.shape[1])
            noise = jax.vmap(lambda seed: draw(jax.random.key(seed)))(seeds)
            result: Any = HiFT(config).apply({"params": params}, mel, noise, lengths)
        wave: jax.Array = result[0]
        return wave

    return jax.jit(run)


def check_voice(config: SpeechDecoderConfig, voice: Voice) -> None:
    """Raises MossError when the arrays of a voice do not fit the decoder, or each other."""
    flow = config.flow
    codes = np.shape(voice.codes)
    mel = np.shape(voice.mel)
    if len(codes) != 1 or mel != (flow.frames_per_code * codes[0], flow.mel_bins):
        raise MossError(
            f"voice: codes {list(codes)} and mel {list(mel)} do not fit, expected "
            f"[P] and [{flow.frames_per_code} P, {flow.mel_bins}]"
        )
    if codes[0] >= flow.max_codes:
        raise MossError(
            f"voice: its recording has {codes[0]} codes ({codes[0] / config.code_rate:g} s), expected fewer than the "
            f"{flow.max_codes} that the speech decoder takes for voice and reply together; enrol a shorter recording"
        )
    if np.shape(voice.embedding) != (flow.speaker_size,):
        raise MossError(f"voice: embedding is {list(np.shape(voice.embedding))}, expected [{flow.speaker_size}]")
    if not (np.isfinite(voice.mel).all() and np.isfinite(voice.embedding).all()):
        raise MossError("voice: mel or embedding has values that are not finite")
    sampler.check_range(flow, np.asarray(voice.codes))
