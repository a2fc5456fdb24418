"""How a synthesizer works: sizes and limits, and what suits this process's devices."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from csm_jax.config import CSMConfig
from csm_jax.slots import SlotSizes


@dataclass(frozen=True, kw_only=True)
class SynthesizerSettings:
    """How a `Synthesizer` works. What a request sounds like depends on the request alone.

    Attributes:
        slots: Requests that are made at the same time.
        capacity: Positions of a slot: prompt and answer together.
        chunk_frames: Frames made per call; a streamed request's audio comes in such pieces.
        prefill_rows: Most prompts that are read together.
        look_ahead: Order a chunk before the last one is read (`csm_jax.engine`).
        voice_segments: Voices whose keys and values are kept at a time; 0 reads a voice's prompt
            again for every request.
        voice_capacity: Positions that such a voice can have; longer ones are read every time.
        codec_rows: Utterances decoded together.
        codec_frames: Frames of each decoded in one call.
        stop_repetition: End requests that say the same again and again.
        redraws: How often a request is drawn again, with a new key, that ran away: that reached the
            frame cap of its text, repeats itself, or is silent for long.
    """

    slots: int
    capacity: int
    chunk_frames: int
    prefill_rows: int
    look_ahead: bool
    voice_segments: int
    voice_capacity: int
    codec_rows: int
    codec_frames: int
    stop_repetition: bool = True
    redraws: int = 0

    @property
    def sizes(self) -> SlotSizes:
        """What is compiled for it."""
        return SlotSizes(
            slots=self.slots,
            capacity=self.capacity,
            chunk_frames=self.chunk_frames,
            prefill_rows=self.prefill_rows,
            segments=self.voice_segments,
            segment_capacity=self.voice_capacity,
        )


def default_settings(
    config: CSMConfig,
    *,
    slots: int,
    capacity: int | None = None,
    voice_bytes: int = 2**28,
    itemsize: int | None = None,
    chunk_frames: int | None = None,
    redraws: int = 0,
) -> SynthesizerSettings:
    """Returns settings that suit this process's devices.

    Args:
        config: The model's sizes.
        slots: Requests that are made at the same time.
        capacity: Positions of a slot; None takes the model's `max_seq_len`.
        voice_bytes: Memory for the keys and values of shared voices; 0 shares none.
        itemsize: Bytes of one of them; None takes what this device computes in.
        chunk_frames: Frames made per call; None chooses.
        redraws: See `SynthesizerSettings`.
    """
    cpu = jax.default_backend() == "cpu"
    backbone = config.backbone
    # 256 positions are 15 s of recordings and their words. Few segments, because every row of every frame
    # is multiplied with all of them (`csm_jax.llama.attend_shared`): 8 of 512 cost a CPU 17 % of a frame.
    positions = min(256, backbone.max_seq_len)
    numbers = 2 * backbone.num_layers * backbone.num_kv_heads * backbone.head_dim * positions
    segments = min(2 if cpu else 8, voice_bytes // (numbers * (itemsize or (4 if cpu else 2))))
    return SynthesizerSettings(
        slots=slots,
        capacity=capacity or backbone.max_seq_len,
        # A frame takes most of a second on a CPU, where a call costs nothing and works beside nobody.
        chunk_frames=chunk_frames or (1 if cpu else 8),
        # It would cost every row that ends a chunk of its slot: 85 % slot use with chunks of 8 frames
        # instead of 94 % (`benchmarks/slot_use.py`). Chunks of 2 can afford it, where a host is slow.
        look_ahead=False,
        # A CPU is busy with one prompt; an accelerator reads the weights for many at one price.
        prefill_rows=1 if cpu else 8,
        voice_segments=segments,
        voice_capacity=positions if segments else 0,
        codec_rows=8 if cpu else 32,
        codec_frames=32,
        redraws=redraws,
    )
