"""The sizes of nano's models."""

from moss_jax.speech_decoder.config import SpeechDecoderConfig
from moss_jax.speech_decoder.flow.config import EncoderConfig, EstimatorConfig, FlowConfig
from moss_jax.speech_decoder.vocoder.config import VocoderConfig
from moss_jax.speech_lm.config import SpeechLMConfig
from moss_jax.speech_tokenizer.config import SpeechTokenizerConfig

# 1.1 million parameters.
SPEECH_TOKENIZER = SpeechTokenizerConfig(
    sample_rate=16000,
    n_fft=400,
    hop_length=160,
    num_mel_bins=80,
    d_model=128,
    num_layers=4,
    encoder_attention_heads=4,
    encoder_ffn_dim=512,
    max_source_positions=1500,
    pooling_kernel_size=4,
    quantize_vocab_size=256,
    code_dim=64,
    normalize_codes=True,
    layer_norm_epsilon=1e-5,
)

# 3.3 million parameters. The text vocabulary is that of the corpus's text tokenizer; no example has more than 256 rows.
LANGUAGE_MODEL = SpeechLMConfig(
    hidden_size=192,
    intermediate_size=384,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    num_shared_layers=5,
    num_modality_layers=2,
    text_vocab_size=800,
    audio_vocab_size=384,
    endoftext_id=768,
    im_start_id=769,
    im_end_id=770,
    sosp_id=771,
    modality_pad_id=792,
    eosp_id=256,
    audio_pad_id=255,
    rope_theta=1e4,
    max_position_embeddings=256,
)

# 2.0 million parameters.
FLOW = FlowConfig(
    vocab_size=256,
    codebook_size=256,
    speaker_size=1,
    chunk=5,
    euler_steps=6,
    guidance=0.0,
    mel_mean=-6.0,
    mel_std=3.0,
    predicts="mel",
    encoder=EncoderConfig(hidden_size=128, num_heads=2, intermediate_size=256, num_layers=2, num_up_layers=1),
    estimator=EstimatorConfig(
        channels=128, num_heads=2, head_dim=64, num_blocks=1, num_mid_stages=1, intermediate_size=256, time_size=128
    ),
)

# 1.3 million parameters.
VOCODER = VocoderConfig(
    channels=192,
    upsample_rates=(5, 4),
    upsample_widths=(9, 8),
    resblock_widths=(3, 7),
    resblock_dilations=((1, 3, 5), (1, 3, 5)),
    source_resblock_widths=(3, 3),
    source_resblock_dilations=((1, 3), (1, 3)),
    fft_size=96,
    fft_hop=24,
    f0_channels=96,
    f0_layers=3,
    free_phase=True,
)

SPEECH_DECODER = SpeechDecoderConfig(flow=FLOW, vocoder=VOCODER, speaker=None, chunks=())
